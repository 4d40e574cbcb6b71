"""Counting what a computation takes, without doing it: its live bytes and its floating-point operations.

Tensors lie on the meta device: they have shapes and no memory. What is counted is the very code that trains, so that no
constant can go stale. Only attention is told how the flash kernels of CPU and accelerators do it (FlashShapes).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..memory.group_offload import inner_tensors

QUANTIZED_PRODUCTS = {
    "quanto::qbytes_mm": 0,
    "aten::_int_mm": 1,
}  # torch knows no count for them; the right factor's dimension of results


class MemoryTracker(TorchDispatchMode):
    """Bytes of the tensors made under it that are alive, their peak, and the operations (a product and a sum are two).

    Memory that is there before does not count, nor what a kernel takes and gives back within itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.is_paused = False
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, Tensor) and hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a quantised tensor first: what it does inside is counted as well
        out = func(*args, **(kwargs or {}))
        if self.is_paused:
            return out
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=out))
        elif func._schema.name in QUANTIZED_PRODUCTS:
            self.flops += 2 * args[0].numel() * args[1].shape[QUANTIZED_PRODUCTS[func._schema.name]]
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if is_countable(leaf)}
        for leaf in tree_leaves(out):
            if is_countable(leaf) and leaf.untyped_storage()._cdata not in given:
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's memory from now until it is freed."""
        for plain in inner_tensors(tensor):
            storage = plain.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            size = storage.nbytes()
            self._known[key] = weakref.finalize(storage, self._forget, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.now -= size

    def mark(self) -> int:
        """Begin a new peak at what is alive now; returns that."""
        self.peak = self.now
        return self.now


def is_countable(value: Any) -> bool:
    return isinstance(value, Tensor) and (type(value) in (Tensor, nn.Parameter))


class ZeroItems(TorchFunctionMode):
    """On the meta device, numbers that are asked for are 0: an optimiser may read a sum on its way, and goes on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.item) and args[0].is_meta:
            return torch.zeros(args[0].shape).tolist()
        return func(*args, **(kwargs or {}))


class FlashShapes(TorchFunctionMode):
    """On the meta device, attention by the shapes of flash kernels; torch would count the slow way, with its T x T matrices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].device.type == "meta":
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))


def bytes_of(*tensors: Tensor) -> int:
    """Bytes that tensors take, quantised ones in all their parts; memory that is shared counts once."""
    storages = {
        plain.untyped_storage()._cdata: plain.untyped_storage().nbytes() for t in tensors for plain in inner_tensors(t)
    }
    return sum(storages.values())
