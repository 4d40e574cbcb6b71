"""Activation offload: tensors saved for the backward pass are stored on the host instead of the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..devices import works_beside

MIN_BYTES = 4096  # copying smaller tensors costs more than it saves


@dataclass(eq=False)
class HostCopy:
    """A saved tensor on the host.

    Attributes:
        tensor: The copy.
        device: Device of the original.
        source: Storage of the original.
    """

    tensor: Tensor
    device: torch.device
    source: StorageWeakRef


class SavedOnHost:
    """Pack and unpack hooks for torch.autograd.graph.saved_tensors_hooks.

    On a GPU, copies are pinned and asynchronous. The copy to the host, the reuse of the memory and the copy back run in
    one stream, which orders them. A tensor that several layers save (the input of to_q, to_k and to_v) is copied once.

    Args:
        stays: Tensors that are never offloaded, such as weights.
    """

    def __init__(self, stays: Iterable[Tensor]):
        # The references keep the address of a storage that is freed, as of weights that are joined, from being another's.
        self._stays = {storage._cdata: StorageWeakRef(storage) for storage in (t.untyped_storage() for t in stays)}
        self._copies: WeakValueDictionary[tuple, HostCopy] = WeakValueDictionary()

    def pack(self, tensor: Tensor) -> Tensor | HostCopy:
        """Copy a saved tensor to the host. Small tensors and those of `stays` are returned as they are."""
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.numel() * tensor.element_size() < MIN_BYTES:
            return tensor
        # Weights that were joined or moved since, and working copies of the adapter (train/step/joined_lora.py). A product
        # saves its weight transposed: a view of it.
        if isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata in self._stays:
            return tensor
        key = (
            storage._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype,
            tensor._version,
        )  # fmt: skip
        existing = self._copies.get(key)
        if existing is not None and not existing.source.expired():
            return existing
        copy = HostCopy(_to_host(tensor), tensor.device, StorageWeakRef(storage))
        self._copies[key] = copy
        return copy

    def unpack(self, value: Tensor | HostCopy) -> Tensor:
        """Copy a packed tensor back to its device."""
        return value.tensor.to(value.device, non_blocking=True) if isinstance(value, HostCopy) else value


def _to_host(tensor: Tensor) -> Tensor:
    pinned = works_beside(tensor.device)
    host = torch.empty_strided(
        tensor.size(), _dense_strides(tensor), dtype=tensor.dtype, device="cpu", pin_memory=pinned
    )
    return host.copy_(tensor, non_blocking=pinned)


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a dense copy with the same order of axes. Kernels, and so the last bits, depend on it."""
    return torch.empty_like(tensor, device="meta").stride()
