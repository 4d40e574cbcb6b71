"""Floating-point weights of frozen layers, whatever their storage format. Used for DoRA's norms and for merging."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Compressed(Protocol):
    """A Linear that stores its weight in fewer bits. Quantized layers implement this method."""

    def dequantize(self) -> Tensor:
        """Return the weight as the layer applies it, (out, in), in the model's load dtype, as a new tensor."""
        ...


def to_double(tensor: Tensor) -> Tensor:
    """Convert to fp64; on the CPU if the tensor's device has no fp64 (MPS)."""
    try:
        return tensor.double()
    except TypeError:
        return tensor.cpu().double()


def dense_weight(linear: nn.Linear) -> Tensor:
    """Return a layer's weight, (out, in), floating point, detached.

    For a plain Linear it is the weight itself: don't write to it.
    """
    if isinstance(linear, Compressed):
        return linear.dequantize().detach()
    weight = linear.weight.detach()
    # Tensor subclasses of other packages (optimum-quanto, torchao); torch.dequantize does not support them.
    return weight.dequantize() if type(weight) not in (Tensor, nn.Parameter) else weight
