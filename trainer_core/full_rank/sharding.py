"""Share out a model's weights, gradients and optimizer states over several devices (setting `shard`).

torch's FSDP2 gathers the weights of a block before it computes, and frees them after it. What is ours, and why
(docs/decisions/0102):

    the sum     gradients are added in fp32, in the order of micro-batches over all devices and rounds
                (gradient_exchange.ShardSum), so that the bytes are the same for every number of devices
    the step    each device steps the slices that it owns, as plain tensors, with the run's own optimizer

A parameter is split by rows, as FSDP2 does it: rank r owns rows [r c, (r + 1) c) with c = ceil(rows / size).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.layer import AdapterLayer
from ..config.request import TrainRequest
from ..devices import wait_for_stream
from ..distributed.gradient_exchange import ShardSum, Wire
from ..distributed.process_group import JoinedRanks, default_group
from ..distributed.ranks import Ranks
from ..optim.optimizer import Slice
from .trained_layer import ShardedLayer

SHARD_PREFIX = "shard-"  # of a checkpoint's files with the rows of a rank (shard_files.py)
# What torch must have, of which 2.6 has the modules and the names. Builds without torch.distributed have none of it.
MODULES = tuple(f"torch.distributed.{name}" for name in ("fsdp", "device_mesh", "tensor", "checkpoint"))
NAMES = ("fully_shard", "FSDPModule", "CPUOffloadPolicy", "MixedPrecisionPolicy", "OffloadPolicy")  # of MODULES[0]
NEEDED = (  # of FSDPModule
    "set_custom_all_gather", "set_custom_reduce_scatter", "set_force_sum_reduction_for_comms", "set_gradient_divide_factor",
)  # fmt: skip
Consume = Callable[["Shard", Tensor], None]


@dataclass(frozen=True, eq=False)
class Shard:
    """The rows of a trained parameter that this device owns.

    Args:
        name: Name of the parameter.
        local: The rows. They share the memory of FSDP2's own tensor.
        shape: Shape of the whole parameter.
        size: Number of devices.
        first_row: Index of the first of the rows.
    """

    name: str
    local: nn.Parameter
    shape: torch.Size
    size: int
    first_row: int

    @property
    def slice(self) -> Slice:
        row = self.shape[1:].numel()
        return Slice(self.shape.numel(), self.first_row * row)

    @property
    def padded_numel(self) -> int:
        return rows_each(self.shape, self.size) * self.shape[1:].numel()


def holds_gradients(request: TrainRequest, size: int) -> bool:
    """Return whether the gradients of all weights are held at once: for several rounds of a step, or for its norm."""
    training = request.training
    return request.optimizer.clips_by_this_step(training.max_grad_norm) or training.accumulation > size


def fault_of_torch() -> str:
    """Return '' if torch has what the shares need, else what is missing."""
    for module in MODULES:
        try:
            import_module(module)
        except ImportError as error:
            return f"torch {torch.__version__} has no {module} ({error})"
    fsdp: Any = import_module(MODULES[0])
    missing = [name for name in NAMES if not hasattr(fsdp, name)]
    if missing:
        return f"torch {torch.__version__} lacks {', '.join(missing)} of {MODULES[0]}"
    missing = [name for name in NEEDED if not hasattr(fsdp.FSDPModule, name)]
    return f"torch {torch.__version__} lacks {', '.join(missing)} of FSDPModule" if missing else ""


def rows_each(shape: torch.Size, size: int) -> int:
    """Return how many rows of a tensor each of `size` devices owns, but for the last ones, which may own less."""
    return -(-shape[0] // size)


class Gather:
    """FSDP2's all_gather, over the wire of the run's gradients."""

    def __init__(self, wire: Wire):
        self.wire = wire

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        assert not async_op
        all_gather(self.wire, output_tensor, input_tensor)


def all_gather(wire: Wire, output: Tensor, part: Tensor) -> None:
    """Gather the equal parts of all ranks, 1-D."""
    here = output if output.device == wire.device else torch.empty_like(output, device=wire.device)
    wire.all_gather(here.view(torch.uint8), part.contiguous().to(wire.device).view(torch.uint8))
    if here is not output:
        output.copy_(here)


@dataclass(eq=False)
class Sharding:
    """The shares of all trained parameters, and the gradients of a step.

    Args:
        ranks: The processes that train together.
        mesh: FSDP2's mesh of their devices.
        shards: Trained parameters by name.
        sums: Of each module that is gathered as a whole. Empty for a single process.
    """

    ranks: Ranks
    mesh: Any
    shards: dict[str, Shard] = field(default_factory=dict)
    sums: list[ShardSum] = field(default_factory=list)
    _consume: Consume | None = None  # in the last round of a step
    _alone: dict[Shard, Tensor] = field(default_factory=dict)  # sums of a single process

    @property
    def slices(self) -> Mapping[nn.Parameter, Slice]:
        return {shard.local: shard.slice for shard in self.shards.values()}

    @contextmanager
    def round(self, consume: Consume | None) -> Iterator[None]:
        """Within the context a backward pass adds its gradients to those of the step's earlier rounds.

        Args:
            consume: Called with each shard and the sum of its gradients, fp32, as soon as it is complete. It must not
                hold the sum longer than the step. None: further rounds follow.
        """
        self._consume = consume
        try:
            yield
        finally:
            self._consume = None

    def clear(self) -> None:
        """Forget the gradients of a step that ends early."""
        self._alone.clear()
        for total in self.sums:
            total.clear()

    def whole(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the whole of a tensor that FSDP2 has sharded; another one as it is. All ranks call it together.

        Args:
            dtype: Cast to it before the exchange.
        """
        from torch.distributed.tensor import DTensor

        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local = local.detach().to(dtype or local.dtype)
        return self.joined(local, tensor.shape) if isinstance(tensor, DTensor) else local

    def joined(self, local: Tensor, shape: torch.Size) -> Tensor:
        """Return a tensor of which each rank has its rows. All ranks call it together."""
        if self.ranks.size == 1:
            return local
        assert isinstance(self.ranks, JoinedRanks) and self.ranks.wire
        rows = rows_each(shape, self.ranks.size)
        part = local.new_zeros((rows, *shape[1:]))
        part[: len(local)] = local
        result = local.new_empty((rows * self.ranks.size, *shape[1:]))
        all_gather(self.ranks.wire, result.view(-1), part.view(-1))
        return result[: shape[0]]

    def sharded(self, local: Tensor, shard: Shard) -> Tensor:
        """Return a tensor of a shard's rows as DTensor, for torch.distributed.checkpoint."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as Placement

        # A DTensor moves its rows to the device of its mesh: those that are in RAM have a mesh of their own.
        mesh = self._mesh_in_ram if local.device.type == "cpu" else self.mesh
        strides = torch.empty(shard.shape, device="meta").stride()
        return DTensor.from_local(local, mesh, [Placement(0)], run_check=False, shape=shard.shape, stride=strides)

    @cached_property
    def _mesh_in_ram(self) -> Any:
        """The mesh with the same ranks, for tensors in RAM. Nothing is exchanged over it."""
        from torch.distributed.device_mesh import DeviceMesh

        return DeviceMesh.from_group(self.mesh.get_group(), "cpu")

    def _on_gradient(self, shard: Shard, total: ShardSum | None, gradient: Tensor) -> None:
        """Take the gradient of a parameter. FSDP2 calls it after it has exchanged the gradients of a module."""
        if total is None:
            summed = self._add_alone(shard, gradient)
        else:
            summed = total.take(shard.local.numel(), shard.padded_numel)
        if self._consume is not None:
            self._consume(shard, summed.to(shard.local.device).view(shard.local.shape))
            if total is not None:
                total.forget_if_taken()

    def _add_alone(self, shard: Shard, gradient: Any) -> Tensor:
        """Return the sum of a single process. FSDP2 has cast the gradient of one micro-batch, without loss."""
        earlier = self._alone.pop(shard, None)
        own = gradient.to_local()
        summed = own.to(torch.float32, copy=True) if earlier is None else earlier.add_(own)
        if self._consume is None:
            self._alone[shard] = summed
        return summed


def shard_(
    transformer: nn.Module,
    blocks: Sequence[nn.Module],
    layers: Mapping[str, AdapterLayer],
    ranks: Ranks,
    device: torch.device,
    computes_in: torch.dtype,
    stores_in: torch.dtype,
    on_host: bool = False,
) -> Sharding:
    """Share out all parameters of a model, which is in RAM. Each block is on the device while it is shared out.

    Args:
        transformer: The model. Its blocks may be wrapped for recomputation, and compiled.
        blocks: Its blocks. Each is gathered as a whole; what is outside of them is gathered together.
        layers: The trained layers, of ShardedLayer.
        ranks: The processes that train together.
        device: The device of this process.
        computes_in: Precision of the gathered weights of the trained layers.
        stores_in: Precision of the shards of the trained layers.
        on_host: The shards stay in RAM, and are stepped there.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    group = ranks.group if isinstance(ranks, JoinedRanks) and ranks.group else default_group()
    sharding = Sharding(ranks, DeviceMesh.from_group(group, device.type))
    wire = ranks.wire if isinstance(ranks, JoinedRanks) else None
    # Nothing writes into the outputs of the model, which are views.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    transformer.computes_in = device, computes_in  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    owners = {
        id(parameter): (name, layer, part) for name, layer in layers.items() for part, parameter in layer.trainable()
    }
    for module in (*_other_precision(transformer, blocks, computes_in), *blocks, transformer):
        members = [owners.pop(id(parameter)) for parameter in module.parameters() if id(parameter) in owners]
        is_cast = False
        for _, layer, part in members:
            parameter = layer.base.get_parameter(part)
            is_cast |= parameter.dtype == computes_in != stores_in
            parameter.data = parameter.data.to(stores_in if is_cast else parameter.dtype).contiguous()
        # Inputs stay as they are: angles of rotary positions and noise levels are fp32. Resharded after each forward
        # pass, also the outermost module: an evaluation, or averaged weights, would leave stale copies.
        policy = MixedPrecisionPolicy(param_dtype=computes_in if is_cast else None, cast_forward_inputs=False)
        fully_shard(
            module, mesh=sharding.mesh, reshard_after_forward=True, mp_policy=policy,
            offload_policy=CPUOffloadPolicy(pin_memory=device.type != "cpu") if on_host else OffloadPolicy(),
        )  # fmt: skip
        total = _exchange_in_order_(module, wire)
        if total is not None:
            sharding.sums.append(total)
        for name, layer, part in members:
            _adopt(sharding, f"{name}.{part}", layer, part, total, device, on_host)
    assert not owners, "parameters of no module"
    return sharding


def _other_precision(transformer: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype) -> list[nn.Module]:
    """Return the parts of a model beside its blocks that are not in its precision: each is gathered by itself."""
    inside = {id(module) for block in blocks for module in block.modules()}
    return [
        child
        for child in transformer.children()
        if not any(id(module) in inside for module in child.modules())
        and {parameter.dtype for parameter in child.parameters()} - {dtype}
    ]


def _exchange_in_order_(module: Any, wire: Wire | None) -> ShardSum | None:
    """Let FSDP2 exchange the parameters and gradients of a module as the run does. Losses are divided already."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    if wire is None:
        return None
    total = ShardSum(wire)
    module.set_custom_all_gather(Gather(wire))
    module.set_custom_reduce_scatter(total)
    return total


def _adopt(
    sharding: Sharding,
    name: str,
    layer: AdapterLayer,
    part: str,
    total: ShardSum | None,
    device: torch.device,
    on_host: bool,
) -> None:
    """Put the rows of a parameter that this device owns among the shards."""
    assert isinstance(layer, ShardedLayer)
    parameter: Any = layer.base.get_parameter(part)  # a DTensor
    ranks = sharding.ranks
    local = nn.Parameter(parameter.to_local().detach())
    first_row = min(rows_each(parameter.shape, ranks.size) * ranks.rank, parameter.shape[0])
    shard = Shard(name, local, parameter.shape, ranks.size, first_row)
    layer.shards[part] = local
    sharding.shards[name] = shard
    itself = weakref.ref(sharding)  # a hook that leads back to it would hold the model's memory after the run

    def on_gradient(own: Tensor) -> None:
        gradient, own.grad = own.grad, None
        if (owner := itself()) is not None and gradient is not None:
            if on_host:  # torch 2.6 to 2.12: the copy to RAM may have just begun, in the current stream
                wait_for_stream(device)
            owner._on_gradient(shard, total, gradient)

    parameter.register_post_accumulate_grad_hook(on_gradient)
