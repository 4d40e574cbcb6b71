"""The weights of a frozen layer as plain numbers, however the layer stores them: what DoRA's norms and merging read."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Compressed(Protocol):
    """A Linear that stores its weight in fewer bits. Quantised layers bring this method."""

    def dequantize(self) -> Tensor:
        """The weight as it acts on an input, (out, in), in the precision the model was loaded in; a new tensor."""
        ...


def to_double(tensor: Tensor) -> Tensor:
    """In fp64; on the CPU where the tensor's device has none (MPS)."""
    try:
        return tensor.double()
    except TypeError:
        return tensor.cpu().double()


def dense_weight(linear: nn.Linear) -> Tensor:
    """A layer's weight, (out, in), floating point, without a gradient. Of a plain Linear it is the weight itself: don't write to it."""
    if isinstance(linear, Compressed):
        return linear.dequantize().detach()
    weight = linear.weight.detach()
    # A tensor class of a package (optimum-quanto's, torchao's); torch's own `dequantize` knows nothing of those.
    return weight.dequantize() if type(weight) not in (Tensor, nn.Parameter) else weight
