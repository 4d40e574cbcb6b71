"""Group offload (block swap): frozen weights live on the host and are copied to the device in groups.

Works for training and sampling. A group is copied to the device before its blocks run, and dropped when the next group
comes. Frozen weights need no copy back; weights that are trained by hand (full_rank/offloaded_layer.py) use write_back. The backward pass needs the weights again. A checkpointed block
runs its forward again, which loads them. For other blocks, autograd saves a reference instead of each weight, and the
reference loads it. diffusers' hooks do neither (docs/decisions, block swap).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..devices import module_of, works_beside
from .activation_offload import SavedOnHost
from .pinned_memory import PinnedMemory, bytes_of


@dataclass(frozen=True)
class WeightSlot:
    """One frozen tensor of a module.

    Attributes:
        module: The module.
        name: Name of the parameter or buffer.
        is_buffer: Whether it is a buffer.
        home: The tensor on the host.
    """

    module: nn.Module
    name: str
    is_buffer: bool
    home: Tensor

    def put(self, tensor: Tensor | None) -> None:
        """Set the module's tensor. None removes it, so that moving the module does not touch it."""
        (self.module._buffers if self.is_buffer else self.module._parameters)[self.name] = tensor  # type: ignore[assignment]


@dataclass(frozen=True)
class OffloadedRef:
    """Reference to an offloaded weight, saved by autograd in its place.

    Attributes:
        group: Index of the group.
        place: Index of the tensor in the group.
        geometry: (size, stride, offset) of the saved view; None for the whole tensor.
    """

    group: int
    place: int
    geometry: tuple[Any, Any, int] | None


class GroupOffload:
    """Groups of frozen tensors. One group is on the device at a time, or two with prefetching.

    Device copies are allocated in the compute stream, and the copy stream waits for the work before the allocation. The
    memory of a released group is therefore free for the next one at once. Memory of the copy stream (with
    record_stream) would only be free when the device gets there: the host is a whole step ahead, so all groups would be
    allocated together.

    Args:
        groups: Modules whose frozen parameters and buffers are moved together, in the order of the forward pass.
        device: Device on which they compute.
        ahead: Prefetch the neighbor group in a separate stream (GPU only). The host tensors are then pinned.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Module]], device: torch.device, ahead: bool = False):
        self.device, self.ahead = device, ahead and works_beside(device)
        self.groups = [[slot for module in group for slot in find_frozen(module)] for group in groups]
        if self.ahead:
            memory = PinnedMemory(
                sum(bytes_of(i) for group in self.groups for slot in group for i in inner_tensors(slot.home))
            )
            for group in self.groups:
                for i, slot in enumerate(group):  # in the list: a group that holds its old slots holds their tensors
                    group[i] = _pin(slot, memory)
        self._stream = module_of(device).Stream(device) if self.ahead else None
        self._resident: dict[int, list[Tensor]] = {}
        self._versions: dict[int, list[int]] = {}  # of the host tensors that the device has copies of
        self._prefetched: dict[int, tuple[list[Tensor], Any]] = {}
        self._by_storage: dict[int, tuple[int, int]] = {}

    def acquire(self, group: int) -> list[Tensor]:
        """Put the group's tensors on the device and into their modules. Other groups are released."""
        if group in self._versions and self._versions[group] != self._versions_now(group):
            self._forget(group)  # the host's tensors have changed: weights were loaded, or averaged ones put there
        if group not in self._resident:
            for other in list(self._resident):
                self.release(other)
            self._resident[group] = self._wait_for(group)
            self._versions[group] = self._versions_now(group)
            for i, (slot, tensor) in enumerate(zip(self.groups[group], self._resident[group], strict=True)):
                slot.put(tensor)
                self._by_storage[storage_key(tensor)] = group, i
        if self._stream is not None:
            self._prefetch(group)
        return self._resident[group]

    def release(self, group: int) -> None:
        """Put the host tensors back into the modules. The device copies are freed when nothing refers to them."""
        for slot in self.groups[group]:
            slot.put(slot.home)
        for tensor in self._resident.pop(group, ()):
            self._by_storage.pop(storage_key(tensor), None)
        if group not in self._prefetched:
            self._versions.pop(group, None)

    def group_of(self, module: nn.Module) -> int:
        """Return the group that holds the tensors of a module."""
        return next(i for i, group in enumerate(self.groups) for slot in group if slot.module is module)

    @torch.no_grad()
    def write_back(self, group: int, tensor: Tensor) -> None:
        """Copy a tensor of a group that is on the device to its place on the host, in the compute stream."""
        place = next(i for i, resident in enumerate(self._resident[group]) if resident is tensor)
        self.groups[group][place].home.copy_(tensor, non_blocking=self.ahead)
        self._versions[group] = self._versions_now(group)

    def _versions_now(self, group: int) -> list[int]:
        """Return numbers that change when the host's tensors change in place."""
        return [slot.home._version for slot in self.groups[group] if not slot.home.is_inference()]

    def _forget(self, group: int) -> None:
        """Drop the copies of a group on the device."""
        if group in self._prefetched:
            self._drop_prefetched()
        self.release(group)
        self._versions.pop(group, None)

    def take_out(self) -> None:
        """Remove the tensors from the modules for now, so that the rest of the modules can be moved."""
        for slot in (slot for group in self.groups for slot in group):
            slot.put(None)

    def send_home(self) -> None:
        """Release all groups, so that none is on the device."""
        self._drop_prefetched()
        for group in range(len(self.groups)):
            self.release(group)

    def note_of(self, tensor: Tensor) -> OffloadedRef | None:
        """Return a reference to a tensor of a group on the device, or None for any other tensor."""
        group, index = self._by_storage.get(storage_key(tensor), (-1, -1))
        if group < 0:
            return None
        resident = self._resident[group][index]
        if is_plain(resident):
            return OffloadedRef(group, index, (tensor.size(), tensor.stride(), int(tensor.storage_offset())))
        return OffloadedRef(group, index, None) if tensor.shape == resident.shape else None

    def read(self, note: OffloadedRef) -> Tensor:
        """Return the weight that a reference stands for."""
        tensor = self.acquire(note.group)[note.place].detach()
        return tensor if note.geometry is None else tensor.as_strided(*note.geometry)

    def _wait_for(self, group: int) -> list[Tensor]:
        tensors, event = self._prefetched.pop(group, (None, None))
        if tensors is None or event is None:
            return [_to_device(slot.home, self.device) for slot in self.groups[group]]
        module_of(self.device).current_stream(self.device).wait_event(event)
        return tensors

    def _prefetch(self, group: int) -> None:
        """Prefetch the next group, or the previous one in a backward pass."""
        backward = torch._C._current_graph_task_id() != -1
        next_group = group - 1 if backward else (group + 1) % len(self.groups)
        if next_group < 0 or next_group in self._resident or next_group in self._prefetched:
            return
        self._drop_prefetched()
        assert self._stream is not None
        module = module_of(self.device)
        tensors = [_allocate_like(slot.home, self.device) for slot in self.groups[next_group]]
        self._stream.wait_stream(module.current_stream(self.device))
        with module.stream(self._stream):
            for slot, tensor in zip(self.groups[next_group], tensors, strict=True):
                _copy_(tensor, slot.home)
            self._prefetched[next_group] = tensors, self._stream.record_event()
        self._versions[next_group] = self._versions_now(next_group)

    def _drop_prefetched(self) -> None:
        """Drop prefetched groups. The compute stream waits for their copies before their memory is reused."""
        for _, event in self._prefetched.values():
            module_of(self.device).current_stream(self.device).wait_event(event)
        self._prefetched.clear()

    def __del__(self) -> None:
        for _, event in getattr(self, "_prefetched", {}).values():  # the current stream may be any
            event.synchronize()


def swap_blocks_(
    blocks: Sequence[nn.Module], device: torch.device, *, per_group: int = 1, ahead: bool = False
) -> GroupOffload:
    """Offload the blocks' frozen weights in groups of `per_group` blocks. Call before checkpoint_blocks_."""
    groups = [blocks[i : i + per_group] for i in range(0, len(blocks), per_group)]
    offload = GroupOffload(groups, device, ahead)
    for i, block in enumerate(blocks):
        block.forward = functools.partial(_run_with_group, offload, i // per_group, block.forward)
    return offload


def swap_leaves_(blocks: Sequence[nn.Module], device: torch.device, *, ahead: bool = False) -> GroupOffload:
    """Offload every frozen Linear of the blocks separately. The small rest of each block stays on the device."""
    leaves = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear) and find_frozen(m)]
    offload = GroupOffload([[leaf] for leaf in leaves], device, ahead)
    for i, leaf in enumerate(leaves):
        leaf.forward = functools.partial(_run_leaf, offload, i, leaf.forward)  # pyright: ignore[reportAttributeAccessIssue]
    return offload


def _run_with_group(offload: GroupOffload, group: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
    offload.acquire(group)
    return forward(*args, **kwargs)


def save_as_notes_(blocks: Sequence[nn.Module], offload: GroupOffload | None, host: SavedOnHost | None) -> None:
    """Make autograd save references to offloaded weights, and activations on the host. For non-checkpointed blocks."""
    for block in blocks:
        block.forward = functools.partial(_save_refs, offload, host, block.forward)


def _save_refs(offload: GroupOffload | None, host: SavedOnHost | None, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)

    def pack(tensor: Tensor) -> Any:
        note = offload.note_of(tensor) if offload is not None else None
        if note is not None:
            return note
        return host.pack(tensor) if host is not None else tensor

    def unpack(value: Any) -> Tensor:
        if isinstance(value, OffloadedRef):
            assert offload is not None
            return offload.read(value)
        return host.unpack(value) if host is not None else value

    with saved_tensors_hooks(pack, unpack):
        return forward(*args, **kwargs)


class _FrozenLinear(torch.autograd.Function):
    """y = W x + b and dx = W^T dy. W is loaded to the device for each product. Saves nothing for the backward pass.

    is_training is whether a gradient of y is needed, which a layer may check (quant/quantized_linear.py). Inside an
    autograd function torch.is_grad_enabled() is always False.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, offload: GroupOffload, group: int, forward: Any, is_training: bool) -> Tensor:
        ctx.offload, ctx.group = offload, group
        offload.acquire(group)
        with torch.set_grad_enabled(is_training):
            return forward(x.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.offload.acquire(ctx.group)
        layer: Any = ctx.offload.groups[ctx.group][0].module
        # Defined by layers that do more than multiply by their weight.
        custom_gradient = getattr(layer, "input_gradient", None)
        gradient = custom_gradient(grads[0]) if custom_gradient else torch.matmul(grads[0], layer.weight.detach())
        return gradient, None, None, None, None


def _run_leaf(offload: GroupOffload, group: int, forward: Any, x: Tensor) -> Tensor:
    return _FrozenLinear.apply(x, offload, group, forward, torch.is_grad_enabled())  # type: ignore[return-value]


def find_frozen(module: nn.Module) -> list[WeightSlot]:
    """Return every frozen parameter and buffer of a module and its submodules."""
    slots = []
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                slots.append(WeightSlot(part, name, False, parameter))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                slots.append(WeightSlot(part, name, True, buffer))
    return slots


def _pin(slot: WeightSlot, memory: PinnedMemory) -> WeightSlot:
    """Return a slot with a pinned copy of its host tensor, which also replaces the tensor in the module."""
    tensor = slot.home.detach()
    home = rebuilt(tensor, [memory.copy_in(inner) for inner in inner_tensors(tensor)])
    pinned = WeightSlot(slot.module, slot.name, slot.is_buffer, like(slot.home, home))
    pinned.put(pinned.home)
    return pinned


def _to_device(home: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device, even if the device's memory is the host's."""
    tensor = home.detach()
    return like(home, rebuilt(tensor, [i.to(device, non_blocking=True, copy=True) for i in inner_tensors(tensor)]))


def _allocate_like(home: Tensor, device: torch.device) -> Tensor:
    """Return an uninitialized tensor like the one _to_device returns."""
    tensor = home.detach()
    return like(home, rebuilt(tensor, [torch.empty_like(i, device=device) for i in inner_tensors(tensor)]))


@torch.no_grad()
def _copy_(tensor: Tensor, home: Tensor) -> None:
    for inner, source in zip(inner_tensors(tensor), inner_tensors(home.detach()), strict=True):
        inner.copy_(source, non_blocking=True)


def like(home: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor as a parameter if home is one."""
    return nn.Parameter(tensor, requires_grad=False) if isinstance(home, nn.Parameter) else tensor


def is_plain(tensor: Tensor) -> bool:
    """Return whether this is a plain tensor and not a quantized one made of several."""
    return not hasattr(tensor, "__tensor_flatten__")


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a (quantized) tensor consists of."""
    if is_plain(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [plain for name in names for plain in inner_tensors(getattr(tensor, name))]


def rebuilt(tensor: Tensor, plains: Sequence[Tensor]) -> Tensor:
    """Return a (quantized) tensor made of other plain tensors, in the order of inner_tensors."""
    rest = list(plains)
    return _rebuild(tensor, rest)


def _rebuild(tensor: Tensor, rest: list[Tensor]) -> Tensor:
    if is_plain(tensor):
        return rest.pop(0)
    names, meta = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {name: _rebuild(getattr(tensor, name), rest) for name in names}
    return type(tensor).__tensor_unflatten__(inner, meta, tensor.size(), tensor.stride())  # type: ignore[attr-defined]


def storage_key(tensor: Tensor) -> int:
    """Return a key of the tensor's memory, valid for as long as the tensor lives. Works on the meta device, too."""
    return inner_tensors(tensor)[0].untyped_storage()._cdata
