"""Count a training step on the meta device, block by block: stored bytes, peak bytes and operations.

Blocks of one kind with the same trained layers have the same cost, so one of each kind is counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..adapters.dense_weight import dense_weight
from ..adapters.inject import inject_, set_dropout_, set_micro_, trainable_parameters
from ..adapters.layer import AdapterLayer, Start
from ..config.request import TrainRequest
from ..devices import DTYPES
from ..flow.loss import velocity_loss
from ..full_rank.step_in_backward import StepInBackward
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
    """A quantized transformer with its adapter and optimizer, on the meta device.

    Args:
        device_type: type of the device of the training.
        kept: returns the result of count_optimizer_cost, by calling its argument or from a cache. The result depends on
            the trainable parameters, not on the base's quantization level.
    """

    def __init__(
        self,
        family: Family,
        request: TrainRequest,
        device_type: str = "cuda",
        kept: Callable[[Callable[[], OptimizerCost]], OptimizerCost] = lambda count: count(),
    ):
        training = request.training
        transformer = copy.deepcopy(family.shared_transformer(request.model))
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
        # An assistant LoRA, and buffers that are in no file and were computed on the CPU.
        for part in transformer.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = buffer.to(META)
        choose_products_(transformer, request.model.quantization.products)
        self.layers = inject_(transformer, list(rates), training.rank, training.alpha, config=request.adapter)
        initialize_((layer for name, layer in self.layers.items() if not name.startswith(tuple(others))), request)
        set_dropout_(self.layers, request.adapter.dropout, training.seed)
        # Before blocks are counted, because the optimizer may change the precision of the parameters (adamw_bf16).
        optimizer = optimizer_of(self.layers, rates, request, device_type)
        self.stepper = None
        if request.adapter.is_full and not training.is_sharded:  # else the gradients of a block are complete together
            self.stepper = StepInBackward(optimizer, dict(trainable_parameters(self.layers)), training.seed)
        self.optimizer_cost = replace(
            kept(lambda: count_optimizer_cost(optimizer, self.layers, request)), start=self._start()
        )

    def cost(self, shape: Shape) -> ModelCost:
        """Count the cost for a shape, in less than a second."""
        self.transformer.__dict__.pop("_rope_by_shape", None)  # so that they are counted for each shape
        by_kernel = FlashShapes() if self.request.memory.attention != "math" else nullcontext()
        set_micro_(self.layers, 0)
        with by_kernel, torch.enable_grad():
            calls, kinds, before, head_peak, *head_flops = _count_outside_blocks(self, shape)
            costs = {kind: _block_cost(self.first[kind[0]], *call, self.stepper) for kind, call in calls.items()}
        positions = bytes_of(
            *(t for pair in self.transformer.__dict__.get("_rope_by_shape", {}).values() for t in pair)
        )
        window, waits = self.routed(shape), self._stream(shape)
        blocks = tuple(replace(costs[kind], waits=waits if i in window else 0) for i, kind in enumerate(kinds))
        inside = {id(t) for block in self.blocks for t in (*block.parameters(), *block.buffers())}
        everything = (*self.transformer.parameters(), *self.transformer.buffers())
        rest = bytes_of(*(t for t in everything if id(t) not in inside and not t.requires_grad))
        weights = rest + sum(block.weights for block in blocks)
        return ModelCost(weights, self.optimizer_cost, blocks, before, head_peak, *head_flops, positions=positions)

    def routed(self, shape: Shape) -> range:
        """Return the indices of the blocks that some of the tokens skip."""
        return range(0) if shape.is_drawn else self.request.training.routed_blocks(len(self.blocks))

    def _stream(self, shape: Shape) -> int:
        """Return the bytes of the image tokens between two blocks."""
        num_tokens = shape.batch * shape.width * shape.height // self.family.pixel_step**2
        transformer: Any = self.transformer
        return num_tokens * transformer.inner_dim * DTYPES[self.request.model.dtype].itemsize

    def _start(self) -> int:
        """Return the bytes of the initial values that layers store. A block counts for all of its kind."""
        inside = {id(layer): kind for kind, block in self.first.items() for layer in block.modules()}
        total = 0
        for layer in self.layers.values():
            size = bytes_of(*(t for _, t in layer.state())) - bytes_of(*(t for _, t in layer.trainable()))
            total += size * (self.kinds.count(inside[id(layer)]) if id(layer) in inside else 1)
        return total


def initialize_(layers: Iterable[AdapterLayer], request: TrainRequest) -> None:
    """Initialize the adapter layers, so that they hold the same tensors as in the run, without values."""
    rng = generator(0, "plan")
    for layer in layers:
        layer.start_(Start(request.training.init, rng, iterations=1, clean=dense_weight(layer.base)))


def kind_of(block: nn.Module, targets: Sequence[str]) -> Any:
    """Return a key that is equal for blocks of equal cost: class, shapes of the parameters, and trained layers."""
    packed = tuple(getattr(getattr(part, "packed", None), "type", "") for part in block.modules())  # of a GGUF file
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    return type(block), shapes, tuple(targets), packed if any(packed) else ()


class _Skip(torch.autograd.Function):
    """A function with outputs and gradients of the right shapes that stores nothing."""

    @staticmethod
    def forward(ctx: Any, shapes: list[Tensor], _: Tensor, *inputs: Tensor) -> Any:
        ctx.inputs = [(x.shape, x.dtype) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs]
        outputs = tuple(torch.empty_like(x) for x in shapes)
        return outputs if len(shapes) > 1 else outputs[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gradients: list[Any] = [i and torch.empty(i[0], dtype=i[1], device=META) for i in ctx.inputs]
        return None, None, *gradients


def _count_outside_blocks(
    model: MetaModel, shape: Shape
) -> tuple[dict[Any, tuple[Any, Any]], list[Any], int, int, int, int]:
    """Count a step without the computation inside of the blocks.

    Returns:
        The arguments of each kind of block (its kind and number of tokens), the kind of each block, and the figures
        `before`, `head_peak`, `head_flops` and `head_forward_flops` of ModelCost.
    """
    calls: dict[Any, tuple[Any, Any]] = {}
    kinds: list[Any] = []
    results: dict[Any, list[Tensor]] = {}
    ends: list[int] = []
    trigger = torch.zeros((), device=META, requires_grad=True)
    counter = MemoryTracker()

    def stand_in(kind: Any, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not ends:
                ends.append(counter.now)
            key = kind, args[0].shape
            kinds.append(key)
            if key not in calls:
                calls[key] = tree_map_only(Tensor, _like, (args, kwargs))
                with torch.no_grad(), _Paused(counter):
                    results[key] = [_like(x) for x in tree_leaves(forward(*calls[key][0], **calls[key][1]))]
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            out = _Skip.apply(results[key], trigger, *tensors)
            ends[1:] = [counter.now]
            counter.mark()
            return out

        return call

    for kind, block in zip(model.kinds, model.blocks, strict=True):
        block.forward = stand_in(kind, block.forward)
    try:
        with counter:
            loss = _loss(model, shape, counter)
            forward = counter.flops
            loss.backward()
    finally:
        for block in model.blocks:
            del block.forward
            for parameter in block.parameters():
                parameter.grad = None
    del loss
    return calls, kinds, ends[0], counter.peak - ends[1], counter.flops, forward


class _Paused:
    """Context manager that pauses an active counter."""

    def __init__(self, counter: MemoryTracker):
        self.counter = counter

    def __enter__(self) -> None:
        self.counter.is_paused = True

    def __exit__(self, *_: Any) -> None:
        self.counter.is_paused = False


def _loss(model: MetaModel, shape: Shape, counter: MemoryTracker) -> Tensor:
    """Compute the loss as micro_loss in train/step/loop.py does."""
    channels, factor = model.family.latent_channels, model.family.latent_factor
    latents = [
        torch.empty(shape.batch, channels, shape.height // factor, shape.width // factor, device=META) for _ in "xv"
    ]
    width = text_width(model.transformer)
    dtype = DTYPES[model.request.model.dtype]
    text = [torch.empty(shape.text_tokens, width, dtype=dtype, device=META) for _ in range(shape.batch)]
    # A reference image has the bucket of its target image.
    beside = {"reference": latents[1]} if model.family.takes_references(model.request.model) else {}
    sigma = torch.ones(shape.batch, device=META)
    route = None
    if window := model.routed(shape):
        num_tokens = shape.height * shape.width // model.family.pixel_step**2
        count = num_kept(num_tokens, model.request.training.routed_share)
        route = Route(window[0], window[-1], torch.empty(shape.batch, count, dtype=torch.int64, device=META))
    prediction = model.family.predict(model.transformer, latents[0], sigma, text, route=route, **beside)
    is_weighed = route is not None or any(model.request.dataset.mask_roots)
    weight = torch.empty_like(latents[0][:, :1]) if is_weighed else None
    return velocity_loss(prediction, latents[1], weight).mean()


def text_width(transformer: Any) -> int:
    """Return the features of a text token, read off the layer that takes them."""
    return int(transformer.context_embedder.in_features)


def _like(tensor: Tensor) -> Tensor:
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
    return like.requires_grad_(tensor.requires_grad and tensor.is_floating_point())


def _block_cost(block: nn.Module, args: Any, kwargs: Any, stepper: StepInBackward | None = None) -> BlockCost:
    """Count a block that is called with these arguments.

    Args:
        stepper: Steps the block's weights inside of its backward pass (kind full).
    """
    linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
    leaves = [bytes_of(*m.parameters(), *m.buffers()) for m in linears]
    trained = bytes_of(*(p for m in linears for p in m.parameters() if p.requires_grad))
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
    # The streams have three dimensions; modulation has more, and a gradient where the approximator is trained.
    trainable = [p for p in block.parameters() if p.requires_grad]
    args = [_like(x).requires_grad_(x.requires_grad or x.ndim == 3) if isinstance(x, Tensor) else x for x in args]
    counter = MemoryTracker()
    with counter:
        base = _make_states(trainable, stepper, counter) if stepper else 0
        results = [x for x in tree_leaves(block(*args, **kwargs)) if isinstance(x, Tensor)]
        kept, grad_peak = counter.now - base, counter.peak - base
        with stepper.active(1) if stepper else nullcontext():
            torch.autograd.backward(results, [torch.empty_like(x) for x in results])
        backward_peak = counter.peak - base
    for parameter in trainable:
        parameter.grad = None
    return BlockCost(
        weights=bytes_of(*frozen), leaves=sum(leaves), largest_leaf=max(leaves, default=0),
        output=output, kept=kept, forward_peak=forward_peak, forward_grad_peak=grad_peak, backward_peak=backward_peak,
        gradients=0 if stepper else bytes_of(*trainable), forward_flops=flops, again_flops=again_flops,
        backward_flops=counter.flops - flops, trained=trained,
    )  # fmt: skip


def _make_states(parameters: Sequence[nn.Parameter], stepper: StepInBackward, counter: MemoryTracker) -> int:
    """Do a first step, which makes the optimizer's states, and return their bytes. OptimizerCost counts them for all."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
        stepper.step_(parameter, 0)
    stepper.forget_norms()
    return counter.mark()
