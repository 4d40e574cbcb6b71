"""A step counted on the meta device, block by block: bytes that are kept and needed for a while, and operations.

Blocks of one kind that learn in the same places take the same, so that one of each is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..adapters.dense_weight import dense_weight
from ..adapters.inject import inject_, set_dropout_, set_micro_
from ..adapters.layer import AdapterLayer, Start
from ..config.request import TrainRequest
from ..devices import DTYPES
from ..flow.loss import velocity_loss
from ..memory.activation_checkpointing import Unread, unread_layers
from ..models.family import Family
from ..models.token_routing import Route, num_kept
from ..quant.low_precision_matmul import choose_products_
from ..registry import load
from ..seeds import generator
from ..setup.attach_adapter import learning
from .cost_model import BlockCost, ModelCost, OptimizerCost, Shape
from .meta_counter import FlashShapes, MemoryTracker, bytes_of
from .optimizer_cost import count_optimizer_cost, optimizer_of

META = torch.device("meta")


class MetaModel:
    """An adapted, quantised transformer without weights, and the optimiser's hold on it.

    Args:
        device_type: where it is to train.
        kept: what upkeep_of gives, by counting or from an earlier count; it depends on what learns, not on the base's level.
    """

    def __init__(
        self,
        family: Family,
        request: TrainRequest,
        device_type: str = "cuda",
        kept: Callable[[Callable[[], OptimizerCost]], OptimizerCost] = lambda count: count(),
    ):
        training = request.training
        transformer = family.empty_transformer(request.model)
        transformer = transformer.to(DTYPES[request.model.dtype]).requires_grad_(False)
        rates = learning(transformer, family, request)
        self.family, self.request, self.transformer = family, request, transformer
        self.blocks = family.blocks(transformer)
        inside = {id(block): name for name, block in transformer.named_modules()}
        paths = [inside[id(block)] + "." for block in self.blocks]
        self.kinds = [
            kind_of(block, [name.removeprefix(path) for name in rates if name.startswith(path)])
            for block, path in zip(self.blocks, paths, strict=True)
        ]
        self.first: dict[Any, nn.Module] = {}
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            self.first.setdefault(kind, block)
        others = [path for block, path in zip(self.blocks, paths, strict=True) if block not in self.first.values()]
        level = request.model.quantization.level
        load("quantization", level)().quantize_(transformer, (*family.full_precision, *(f"{p}*" for p in others)))
        family.prepare_(transformer, request.model)
        for (
            part
        ) in transformer.modules():  # an assistant, and buffers that no file holds and that were computed on the CPU
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = buffer.to(META)
        choose_products_(transformer, request.model.quantization.products)
        self.layers = inject_(transformer, list(rates), training.rank, training.alpha, config=request.adapter)
        begin_((layer for name, layer in self.layers.items() if not name.startswith(tuple(others))), request)
        set_dropout_(self.layers, request.adapter.dropout, training.seed)
        # Before a block is counted: what learns may change its precision (adamw_bf16).
        optimizer = optimizer_of(self.layers, rates, request, device_type)
        self.optimizer_cost = replace(
            kept(lambda: count_optimizer_cost(optimizer, self.layers, request)), start=self._start()
        )

    def cost(self, shape: Shape) -> ModelCost:
        """Counted; a part of a second."""
        by_kernel = FlashShapes() if self.request.memory.attention != "math" else nullcontext()
        set_micro_(self.layers, 0)
        with by_kernel, torch.enable_grad():
            calls, asked, before, head_peak, *head_flops = _rest(self, shape)
            known = {which: _block_cost(self.first[which[0]], *call) for which, call in calls.items()}
        window, waits = self.routed(shape), self._stream(shape)
        blocks = tuple(replace(known[which], waits=waits if i in window else 0) for i, which in enumerate(asked))
        inside = {id(t) for block in self.blocks for t in (*block.parameters(), *block.buffers())}
        everything = (*self.transformer.parameters(), *self.transformer.buffers())
        rest = bytes_of(*(t for t in everything if id(t) not in inside and not t.requires_grad))
        weights = rest + sum(block.weights for block in blocks)
        return ModelCost(weights, self.optimizer_cost, blocks, before, head_peak, *head_flops)

    def routed(self, shape: Shape) -> range:
        """Places of the blocks that some of the tokens skip."""
        return range(0) if shape.is_drawn else self.request.training.routed_blocks(len(self.blocks))

    def _stream(self, shape: Shape) -> int:
        """Bytes of a picture's tokens between two blocks."""
        num_tokens = shape.batch * shape.width * shape.height // self.family.pixel_step**2
        transformer: Any = self.transformer
        return num_tokens * transformer.inner_dim * DTYPES[self.request.model.dtype].itemsize

    def _start(self) -> int:
        """Bytes that layers keep of what they began with; those of a block count for every block of its kind."""
        inside = {id(layer): kind for kind, block in self.first.items() for layer in block.modules()}
        total = 0
        for layer in self.layers.values():
            held = bytes_of(*(t for _, t in layer.state())) - bytes_of(*(t for _, t in layer.trainable()))
            total += held * (self.kinds.count(inside[id(layer)]) if id(layer) in inside else 1)
        return total


def begin_(layers: Iterable[AdapterLayer], request: TrainRequest) -> None:
    """Let them start, so that they hold what they hold in the run; numbers there are none."""
    draw = generator(0, "plan")
    for layer in layers:
        layer.start_(Start(request.training.init, draw, iterations=1, clean=dense_weight(layer.base)))


def kind_of(block: nn.Module, targets: Sequence[str]) -> Any:
    """Equal for blocks that take the same: class, shapes of what is in them, and the layers that learn."""
    return type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters()), tuple(targets)


class _Skip(torch.autograd.Function):
    """Results and gradients of the right shapes, and nothing kept."""

    @staticmethod
    def forward(ctx: Any, shapes: list[Tensor], _: Tensor, *inputs: Tensor) -> Any:
        ctx.inputs = [(x.shape, x.dtype) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs]
        outputs = tuple(torch.empty_like(x) for x in shapes)
        return outputs if len(shapes) > 1 else outputs[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found: list[Any] = [i and torch.empty(i[0], dtype=i[1], device=META) for i in ctx.inputs]
        return None, None, *found


def _rest(skeleton: MetaModel, shape: Shape) -> tuple[dict[Any, tuple[Any, Any]], list[Any], int, int, int, int]:
    """A step without what happens in blocks: what each kind of block is called with, for every number of tokens, and which of
    these each block is."""
    calls: dict[Any, tuple[Any, Any]] = {}
    asked: list[Any] = []
    results: dict[Any, list[Tensor]] = {}
    ends: list[int] = []
    trigger = torch.zeros((), device=META, requires_grad=True)
    counter = MemoryTracker()

    def stand_in(kind: Any, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not ends:
                ends.append(counter.now)
            which = kind, args[0].shape
            asked.append(which)
            if which not in calls:
                calls[which] = tree_map_only(Tensor, _like, (args, kwargs))
                with torch.no_grad(), _Paused(counter):
                    results[which] = [_like(x) for x in tree_leaves(forward(*calls[which][0], **calls[which][1]))]
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            out = _Skip.apply(results[which], trigger, *tensors)
            ends[1:] = [counter.now]
            counter.mark()
            return out

        return call

    for kind, block in zip(skeleton.kinds, skeleton.blocks, strict=True):
        block.forward = stand_in(kind, block.forward)
    try:
        with counter:
            loss = _loss(skeleton, shape, counter)
            forward = counter.flops
            loss.backward()
    finally:
        for block in skeleton.blocks:
            del block.forward
            for parameter in block.parameters():
                parameter.grad = None
    del loss
    return calls, asked, ends[0], counter.peak - ends[1], counter.flops, forward


class _Paused:
    """Under a counter that is on, nothing is counted for a while."""

    def __init__(self, counter: MemoryTracker):
        self.counter = counter

    def __enter__(self) -> None:
        self.counter.is_paused = True

    def __exit__(self, *_: Any) -> None:
        self.counter.is_paused = False


def _loss(skeleton: MetaModel, shape: Shape, counter: MemoryTracker) -> Tensor:
    """As train/step/loop.py's micro_loss."""
    factor = skeleton.family.pixel_step // 2
    channels = 16
    latents = [
        torch.empty(shape.batch, channels, shape.height // factor, shape.width // factor, device=META) for _ in "xv"
    ]
    width = text_width(skeleton.transformer)
    dtype = DTYPES[skeleton.request.model.dtype]
    text = [torch.empty(shape.text_tokens, width, dtype=dtype, device=META) for _ in range(shape.batch)]
    # A picture to start from has the bucket of the one that is to become of it.
    beside = {"reference": latents[1]} if skeleton.family.takes_references(skeleton.request.model) else {}
    sigma = torch.ones(shape.batch, device=META)
    route = None
    if window := skeleton.routed(shape):
        num_tokens = latents[0][0, 0].numel() // 4
        count = num_kept(num_tokens, skeleton.request.training.routed_share)
        route = Route(window[0], window[-1], torch.empty(shape.batch, count, dtype=torch.int64, device=META))
    prediction = skeleton.family.predict(skeleton.transformer, latents[0], sigma, text, route=route, **beside)
    is_weighed = route is not None or any(skeleton.request.dataset.mask_roots)
    weight = torch.empty_like(latents[0][:, :1]) if is_weighed else None
    return velocity_loss(prediction, latents[1], weight).mean()


def text_width(transformer: Any) -> int:
    """Features of a text token, read off the layer that takes them."""
    return int(transformer.context_embedder.in_features)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _block_cost(block: nn.Module, args: Any, kwargs: Any) -> BlockCost:
    leaves = [bytes_of(*m.parameters(), *m.buffers()) for m in block.modules() if isinstance(m, nn.Linear)]
    frozen = [p for p in (*block.parameters(), *block.buffers()) if not p.requires_grad]
    counter = MemoryTracker()
    with torch.no_grad(), counter:
        result = block(*args, **kwargs)
    output, forward_peak = counter.now, counter.peak
    del result
    flops = counter.flops
    counter = MemoryTracker()
    with torch.no_grad(), Unread(unread_layers(block, *args, **kwargs)), counter:
        block(*args, **kwargs)
    again_flops = counter.flops
    # The streams; tables of positions are deeper.
    args = [_like(x).requires_grad_() if isinstance(x, Tensor) and x.ndim == 3 else x for x in args]
    counter = MemoryTracker()
    with counter:
        results = [x for x in tree_leaves(block(*args, **kwargs)) if isinstance(x, Tensor)]
        kept, grad_peak = counter.now, counter.peak
        torch.autograd.backward(results, [torch.empty_like(x) for x in results])
        backward_peak = counter.peak
    learning = [p for p in block.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.grad = None
    return BlockCost(
        weights=bytes_of(*frozen), leaves=sum(leaves), largest_leaf=max(leaves, default=0),
        output=output, kept=kept, forward_peak=forward_peak, forward_grad_peak=grad_peak, backward_peak=backward_peak,
        gradients=bytes_of(*learning), forward_flops=flops, again_flops=again_flops, backward_flops=counter.flops - flops,
    )  # fmt: skip
