"""What the forward pass keeps for the backward pass, kept on the host instead of the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..devices import works_beside

MIN_BYTES = 4096  # below this a copy costs more than it frees


@dataclass(eq=False)
class HostCopy:
    """A saved tensor on the host, and the device it came from."""

    tensor: Tensor
    device: torch.device
    source: StorageWeakRef


class SavedOnHost:
    """Pack and unpack hooks for torch.autograd.graph.saved_tensors_hooks.

    Copies are pinned and asynchronous on a GPU; copy, reuse of the memory and way back are ordered by the one stream.
    A tensor that several layers keep (the input of to_q, to_k and to_v) is copied once.

    Args:
        stays: tensors that never leave, such as weights.
    """

    def __init__(self, stays: Iterable[Tensor]):
        self._stays = {tensor.untyped_storage()._cdata for tensor in stays}
        self._copies: WeakValueDictionary[tuple, HostCopy] = WeakValueDictionary()

    def pack(self, tensor: Tensor) -> Tensor | HostCopy:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.numel() * tensor.element_size() < MIN_BYTES:
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata in self._stays:
            return tensor
        key = (
            storage._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor._version,
        )  # fmt: skip
        known = self._copies.get(key)
        if known is not None and not known.source.expired():
            return known
        copy = HostCopy(_to_host(tensor), tensor.device, StorageWeakRef(storage))
        self._copies[key] = copy
        return copy

    def unpack(self, value: Tensor | HostCopy) -> Tensor:
        return value.tensor.to(value.device, non_blocking=True) if isinstance(value, HostCopy) else value


def _to_host(tensor: Tensor) -> Tensor:
    pinned = works_beside(tensor.device)
    host = torch.empty_strided(
        tensor.size(), _dense_strides(tensor), dtype=tensor.dtype, device="cpu", pin_memory=pinned
    )
    return host.copy_(tensor, non_blocking=pinned)


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a copy that keeps the order of axes: kernels (and so the last bits) depend on it."""
    return torch.empty_like(tensor, device="meta").stride()
