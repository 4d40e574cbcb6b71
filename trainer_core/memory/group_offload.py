"""Weights that live on the host and come to the device in groups, in training as in sampling.

The base is frozen, so nothing has to go back: a group is copied to the device before its blocks run and dropped when the
next one comes. The backward pass needs the weights again. Where a block is checkpointed its forward runs a second time and
brings them; where it is not, autograd is given a note in the place of each weight, and the note brings it.
diffusers' hooks do neither (docs/decisions, block swap).
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
    """One frozen tensor of a module. home: on the host."""

    module: nn.Module
    name: str
    is_buffer: bool
    home: Tensor

    def put(self, tensor: Tensor | None) -> None:
        """Let the module have this tensor; None: let it do without, so that moving the module leaves it alone."""
        (self.module._buffers if self.is_buffer else self.module._parameters)[self.name] = tensor  # type: ignore[assignment]


@dataclass(frozen=True)
class OffloadedRef:
    """Stands for a saved weight. geometry: (size, stride, offset) of the view, None for the whole tensor."""

    group: int
    place: int
    geometry: tuple[Any, Any, int] | None


class GroupOffload:
    """Groups of frozen tensors, of which one is on the device, and one more where copies run ahead.

    Args:
        groups: modules whose frozen parameters and buffers travel together, in order of the forward pass.
        device: where they compute.
        ahead: copy the neighbour group on a stream of its own meanwhile (a GPU); homes are pinned.

    All copies lie in memory of the stream that computes, and the copying stream waits for what that was given before. So a group that is
    released makes room for the next one at once. Memory of the copying stream, with record_stream, would be free only when the device has
    come so far: the host is ahead of it by a whole step, and all groups would be there together.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Module]], device: torch.device, ahead: bool = False):
        self.device, self.ahead = device, ahead and works_beside(device)
        self.groups = [[place for module in group for place in find_frozen(module)] for group in groups]
        if self.ahead:
            memory = PinnedMemory(
                sum(bytes_of(i) for group in self.groups for place in group for i in inner_tensors(place.home))
            )
            self.groups = [[_pin(place, memory) for place in group] for group in self.groups]
        self._stream = module_of(device).Stream(device) if self.ahead else None
        self._here: dict[int, list[Tensor]] = {}
        self._coming: dict[int, tuple[list[Tensor], Any]] = {}
        self._by_storage: dict[int, tuple[int, int]] = {}

    def acquire(self, group: int) -> list[Tensor]:
        """The group's tensors on the device, put into their modules; others leave."""
        if group not in self._here:
            for other in list(self._here):
                self.release(other)
            self._here[group] = self._wait_for(group)
            for i, (place, tensor) in enumerate(zip(self.groups[group], self._here[group], strict=True)):
                place.put(tensor)
                self._by_storage[storage_key(tensor)] = group, i
        if self._stream is not None:
            self._send_ahead(group)
        return self._here[group]

    def release(self, group: int) -> None:
        """The homes take their places again; the device's copies are freed when nothing refers to them."""
        for place in self.groups[group]:
            place.put(place.home)
        for tensor in self._here.pop(group, ()):
            self._by_storage.pop(storage_key(tensor), None)

    def take_out(self) -> None:
        """Modules do without these tensors for now, so that what is left of them can be moved."""
        for place in (place for group in self.groups for place in group):
            place.put(None)

    def send_home(self) -> None:
        """No group is on the device."""
        self._forget()
        for group in range(len(self.groups)):
            self.release(group)

    def note_of(self, tensor: Tensor) -> OffloadedRef | None:
        """The note for a tensor of a group that is here, None for any other tensor."""
        group, place = self._by_storage.get(storage_key(tensor), (-1, -1))
        if group < 0:
            return None
        here = self._here[group][place]
        if is_plain(here):
            return OffloadedRef(group, place, (tensor.size(), tensor.stride(), int(tensor.storage_offset())))
        return OffloadedRef(group, place, None) if tensor.shape == here.shape else None

    def read(self, note: OffloadedRef) -> Tensor:
        """The weight that a note stands for."""
        tensor = self.acquire(note.group)[note.place].detach()
        return tensor if note.geometry is None else tensor.as_strided(*note.geometry)

    def _wait_for(self, group: int) -> list[Tensor]:
        tensors, event = self._coming.pop(group, (None, None))
        if tensors is None or event is None:
            return [_on(place.home, self.device) for place in self.groups[group]]
        module_of(self.device).current_stream(self.device).wait_event(event)
        return tensors

    def _send_ahead(self, group: int) -> None:
        """The next group forward, the one before in a backward pass."""
        backward = torch._C._current_graph_task_id() != -1
        wanted = group - 1 if backward else (group + 1) % len(self.groups)
        if wanted < 0 or wanted in self._here or wanted in self._coming:
            return
        self._forget()
        assert self._stream is not None
        module = module_of(self.device)
        tensors = [_room_for(place.home, self.device) for place in self.groups[wanted]]
        self._stream.wait_stream(module.current_stream(self.device))
        with module.stream(self._stream):
            for place, tensor in zip(self.groups[wanted], tensors, strict=True):
                _copy_(tensor, place.home)
            self._coming[wanted] = tensors, self._stream.record_event()

    def _forget(self) -> None:
        """Groups that come are not wanted: who takes their memory waits until the copies are over."""
        for _, event in self._coming.values():
            module_of(self.device).current_stream(self.device).wait_event(event)
        self._coming.clear()

    def __del__(self) -> None:
        for _, event in getattr(self, "_coming", {}).values():  # on whatever stream this may be
            event.synchronize()


def swap_blocks_(
    blocks: Sequence[nn.Module], device: torch.device, *, per_group: int = 1, ahead: bool = False
) -> GroupOffload:
    """Blocks whose frozen weights come to the device in groups of `per_group`. Call before checkpoint_blocks_."""
    groups = [blocks[i : i + per_group] for i in range(0, len(blocks), per_group)]
    swap = GroupOffload(groups, device, ahead)
    for i, block in enumerate(blocks):
        block.forward = functools.partial(_with_group, swap, i // per_group, block.forward)
    return swap


def swap_leaves_(blocks: Sequence[nn.Module], device: torch.device, *, ahead: bool = False) -> GroupOffload:
    """Every frozen Linear of the blocks comes to the device by itself; the small rest of a block stays there."""
    leaves = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear) and find_frozen(m)]
    swap = GroupOffload([[leaf] for leaf in leaves], device, ahead)
    for i, leaf in enumerate(leaves):
        leaf.forward = functools.partial(_leaf, swap, i, leaf.forward)  # pyright: ignore[reportAttributeAccessIssue]
    return swap


def _with_group(swap: GroupOffload, group: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
    swap.acquire(group)
    return forward(*args, **kwargs)


def save_as_notes_(blocks: Sequence[nn.Module], swap: GroupOffload | None, host: SavedOnHost | None) -> None:
    """For blocks that are not checkpointed: autograd keeps notes of swapped weights, and activations on the host."""
    for block in blocks:
        block.forward = functools.partial(_save_refs, swap, host, block.forward)


def _save_refs(swap: GroupOffload | None, host: SavedOnHost | None, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)

    def pack(tensor: Tensor) -> Any:
        note = swap.note_of(tensor) if swap is not None else None
        if note is not None:
            return note
        return host.pack(tensor) if host is not None else tensor

    def unpack(value: Any) -> Tensor:
        if isinstance(value, OffloadedRef):
            assert swap is not None
            return swap.read(value)
        return host.unpack(value) if host is not None else value

    with saved_tensors_hooks(pack, unpack):
        return forward(*args, **kwargs)


class _FrozenLinear(torch.autograd.Function):
    """y = W x + b with W on the device for this product alone; dx = W^T dy with W brought again. Saves nothing.

    is_training: gradients are wanted of y, which a layer may ask (quant/quantized_linear.py); inside of a function torch would always say no.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, swap: GroupOffload, group: int, forward: Any, is_training: bool) -> Tensor:
        ctx.swap, ctx.group = swap, group
        swap.acquire(group)
        with torch.set_grad_enabled(is_training):
            return forward(x.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.swap.acquire(ctx.group)
        layer: Any = ctx.swap.groups[ctx.group][0].module
        own = getattr(layer, "input_gradient", None)  # of layers that do not simply multiply with their weight
        return own(grads[0]) if own else torch.matmul(grads[0], layer.weight.detach()), None, None, None, None


def _leaf(swap: GroupOffload, group: int, forward: Any, x: Tensor) -> Tensor:
    return _FrozenLinear.apply(x, swap, group, forward, torch.is_grad_enabled())  # type: ignore[return-value]


def find_frozen(module: nn.Module) -> list[WeightSlot]:
    """Every frozen parameter and buffer of a module and its parts."""
    found = []
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                found.append(WeightSlot(part, name, False, parameter))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                found.append(WeightSlot(part, name, True, buffer))
    return found


def _pin(place: WeightSlot, memory: PinnedMemory) -> WeightSlot:
    """In its module the pinned home takes the other's place at once, so that the base does not lie in RAM twice."""
    tensor = place.home.detach()
    home = rebuilt(tensor, [memory.copy_in(inner) for inner in inner_tensors(tensor)])
    made = WeightSlot(place.module, place.name, place.is_buffer, like(place.home, home))
    made.put(made.home)
    return made


def _on(home: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, even where that is the host's own memory."""
    tensor = home.detach()
    return like(home, rebuilt(tensor, [i.to(device, non_blocking=True, copy=True) for i in inner_tensors(tensor)]))


def _room_for(home: Tensor, device: torch.device) -> Tensor:
    """Like _on, with nothing in it yet."""
    tensor = home.detach()
    return like(home, rebuilt(tensor, [torch.empty_like(i, device=device) for i in inner_tensors(tensor)]))


@torch.no_grad()
def _copy_(tensor: Tensor, home: Tensor) -> None:
    for inner, source in zip(inner_tensors(tensor), inner_tensors(home.detach()), strict=True):
        inner.copy_(source, non_blocking=True)


def like(home: Tensor, tensor: Tensor) -> Tensor:
    """The tensor as a parameter, where home is one."""
    return nn.Parameter(tensor, requires_grad=False) if isinstance(home, nn.Parameter) else tensor


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a tensor of its own and not a quantised one made of several."""
    return not hasattr(tensor, "__tensor_flatten__")


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a (quantised) tensor is made of."""
    if is_plain(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [plain for name in names for plain in inner_tensors(getattr(tensor, name))]


def rebuilt(tensor: Tensor, plains: Sequence[Tensor]) -> Tensor:
    """The same (quantised) tensor over other plain tensors, in the order of inner_tensors."""
    rest = list(plains)
    return _rebuilt(tensor, rest)


def _rebuilt(tensor: Tensor, rest: list[Tensor]) -> Tensor:
    if is_plain(tensor):
        return rest.pop(0)
    names, meta = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {name: _rebuilt(getattr(tensor, name), rest) for name in names}
    return type(tensor).__tensor_unflatten__(inner, meta, tensor.size(), tensor.stride())  # type: ignore[attr-defined]


def storage_key(tensor: Tensor) -> int:
    """Names the memory that a tensor lies in, for as long as it lives; works without memory too (meta)."""
    return inner_tensors(tensor)[0].untyped_storage()._cdata
