"""A Linear layer whose weight is stored in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Format(Protocol):
    """How a weight is decoded from its plain low-precision tensors."""

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the weight, (out, in), in dtype: a new tensor on the device of the stored tensors."""
        ...


class Multiply(Protocol):
    """Multiplies codes without decoding them. See low_precision_matmul.py."""

    def __call__(self, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """(..., in) x (out, in) -> (..., out), in the precision of x, with a gradient to x."""
        ...

    def gradient(self, grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """Return that gradient: (..., out) x (out, in) -> (..., in)."""
        ...


class QuantizedLinear(nn.Linear):
    """y = W~ x + b, where W~ is decoded for each matrix product and not stored, not even for the backward pass.

    With a `product` nothing is decoded while gradients are computed: inputs are rounded and multiplied with the codes.
    Without gradients (validation images, losses on held-out images, norms) W~ is decoded and inputs are not rounded,
    because that is how the LoRA will be used.

    The stored tensors are plain parameters without a gradient, which are moved, saved and loaded like any others. They
    keep their own types: `.to(dtype)` changes the bias and the precision that W~ is decoded in, but not them.

    Args:
        format: See Format.
        stored: Result of its `encode`.
        shape: (out, in).
        dtype: Precision of the weight when it was loaded.
        bias: (out,) or None.
    """

    def __init__(
        self,
        format: Format,
        stored: Mapping[str, Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: Tensor | None,
    ):
        nn.Module.__init__(self)  # nn.Linear's own __init__ would create a weight
        self.out_features, self.in_features = shape
        self.format, self.dtype, self.stored_names = format, dtype, tuple(stored)
        self.product: Multiply | None = None  # for levels that store `codes` and `scale`
        for name, tensor in stored.items():
            self.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def stored(self) -> dict[str, Tensor]:
        """The stored tensors of the weight."""
        return {name: getattr(self, name) for name in self.stored_names}

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The decoded weight; see dequantize(). It is decoded on every access."""
        return self.dequantize()

    def dequantize(self) -> Tensor:
        """Return W~, (out, in), in the precision it was loaded in. See adapters/dense_weight.py."""
        with torch.no_grad():
            return self.format.decode(self.stored, (self.out_features, self.in_features), self.dtype)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(..., in) -> (..., out), in the precision of x."""
        y: Tensor
        if self.product is not None and torch.is_grad_enabled():
            stored = self.stored
            y = self.product(x, stored["codes"], stored["scale"])
        elif not (x.requires_grad and torch.is_grad_enabled()):
            # Without the autograd function: torch.compile (torch 2.6 to 2.13) loses its context where no gradient is
            # needed, if there are two stored tensors.
            y = F.linear(x, self.format.decode(self.stored, (self.out_features, self.in_features), x.dtype))
        else:
            stored = [getattr(self, name) for name in self.stored_names]
            shape = self.out_features, self.in_features
            y = _Product.apply(x, self.format, self.stored_names, shape, *stored)  # pyright: ignore[reportAssignmentType]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Return dL/dx of forward from dL/dy, for callers without autograd: (..., out) -> (..., in)."""
        if self.product is None:
            return torch.matmul(grad, self.dequantize())
        stored = self.stored
        return self.product.gradient(grad, stored["codes"], stored["scale"])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {type(self.format).__name__}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # Parameters are changed in place; offloading removes them temporarily.
        before = {name: tensor.detach() for name, tensor in self.stored.items() if tensor is not None}
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:  # packed bits and scales keep their own types
                setattr(self, name, nn.Parameter(old.to(new.device), requires_grad=False))
        return self


class _Product(torch.autograd.Function):
    """y = x W~^T, and dL/dx = dL/dy W~.

    Both decode W~ from the stored tensors, so that no full weight is held for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, format: Format, names: tuple[str, ...], shape: tuple[int, int], *stored: Tensor
    ) -> Tensor:
        ctx.format, ctx.names, ctx.shape = format, names, shape
        ctx.save_for_backward(*stored)
        return F.linear(x, format.decode(dict(zip(names, stored, strict=True)), shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        stored = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        weight = ctx.format.decode(stored, ctx.shape, grad.dtype)
        return (grad @ weight, None, None, None, *[None] * len(stored))
