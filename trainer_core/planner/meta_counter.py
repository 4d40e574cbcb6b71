"""Count the allocated bytes and the floating-point operations of a computation without doing it.

Tensors are on the meta device: they have shapes and no memory. The counted code is the training code itself, so no
constant can become outdated. Only attention is replaced, with the shapes of the flash kernels of CPU and accelerators
(FlashShapes).
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

# Operators without a FLOP formula in torch -> dimension of the right factor that gives the output features.
QUANTIZED_PRODUCTS = {
    "quanto::qbytes_mm": 0,
    "aten::_int_mm": 1,
}


class MemoryTracker(TorchDispatchMode):
    """Tracks the bytes of the live tensors that are created within it, their peak, and the operations.

    A multiplication and an addition count as two operations. Tensors from before are not counted, nor is temporary
    memory inside of a kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.is_paused = False
        self._finalizers: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, Tensor) and hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # the quantized tensor dispatches first: the operations inside it are counted as well
        out = func(*args, **(kwargs or {}))
        if self.is_paused:
            return out
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=out))
        elif func._schema.name in QUANTIZED_PRODUCTS:
            self.flops += 2 * args[0].numel() * args[1].shape[QUANTIZED_PRODUCTS[func._schema.name]]
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if is_countable(leaf)}
        for leaf in tree_leaves(out):
            if is_countable(leaf) and leaf.untyped_storage()._cdata not in inputs:
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is freed."""
        for plain in inner_tensors(tensor):
            storage = plain.untyped_storage()
            key = storage._cdata
            if key in self._finalizers:
                continue
            size = storage.nbytes()
            self._finalizers[key] = weakref.finalize(storage, self._forget, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        if self._finalizers.pop(key, None) is not None:
            self.now -= size

    def mark(self) -> int:
        """Reset the peak to the bytes that are allocated now, and return them."""
        self.peak = self.now
        return self.now


def is_countable(value: Any) -> bool:
    """Return whether a value is a plain tensor."""
    return isinstance(value, Tensor) and (type(value) in (Tensor, nn.Parameter))


class ZeroItems(TorchFunctionMode):
    """On the meta device, read all values as 0, so that an optimizer that reads a sum can continue."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.item) and args[0].is_meta:
            return torch.zeros(args[0].shape).tolist()
        return func(*args, **(kwargs or {}))


class FlashShapes(TorchFunctionMode):
    """On the meta device, compute attention with the shapes of flash kernels.

    torch would count the math kernel with its tokens x tokens matrices.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].device.type == "meta":
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))


def bytes_of(*tensors: Tensor) -> int:
    """Return the bytes of tensors. Quantized tensors count with all their parts, and shared memory counts once."""
    storages = {
        plain.untyped_storage()._cdata: plain.untyped_storage().nbytes() for t in tensors for plain in inner_tensors(t)
    }
    return sum(storages.values())
