"""Low-precision matrix products: activations and gradients are rounded to 8 bits, and weights already are.

    forward    y = s_x s_w  (X_8 W_8^T)     X_8 = round(x / s_x),  s_x = max |row of x| / highest,  one per token
    backward   dL/dx = s_g  (G_8 W_8)       G_8 = round(g / s_g),  g = dL/dy s_w,  s_g likewise

W_8 (out, in) and s_w (out, 1) are what the level stores (rowwise.py). In the backward product the scale of W's rows
lies along the dimension that is summed over, so the gradient is multiplied by it before it is rounded. The base model
is frozen, so there is no weight gradient. Nothing is decoded, and no input is saved for the backward pass. Rounding is
to nearest, row by row: the values of a token do not depend on other tokens.

Limits of dtypes are looked up where they are used: torch.compile treats a global float as a variable, and fails on the
second of two autograd functions that read it (torch 2.13, lift_tracked_freevar_to_input).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.model import QuantizationConfig
from ..errors import Problem, reason_of
from ..registry import load
from .native import FP8
from .quantized_linear import QuantizedLinear
from .quantizer import is_kept
from .rowwise import RowScaled

EXACT = "exact"
CPU = "cpu"
PROBE = (20, 64, 96)  # rows, in, out; as few rows as a short prompt
PROBE_ERROR = 0.1  # relative; the error of 8 bits is at most 0.04, that of a wrong layout 1
# Maximum terms of an int8 dot product in fp32: 128 * 127 * 1024 < 2^24, so that every partial sum is exact.
EXACT_TERMS = 1024
# Flux's modulation layers: one row for a whole image, whose error would affect all of its tokens. No time to gain.
MODULATION = ("*norm*.linear",)
FEWEST_ROWS = 17  # minimum for int8 in cuBLAS (torch 2.5 to 2.13)
ADA = (8, 9)  # the first compute capability with float8 products


class RoundedProduct(ABC):
    """How values are rounded, and how they are multiplied. See the module docstring.

    Attributes:
        multiple: Both widths of a layer must be multiples of this; other layers use exact products.
    """

    multiple: int

    def __call__(self, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """y = x W^T with W = scale * codes.

        Args:
            x: (..., in), floating point.
            codes: (out, in), of the type that this class multiplies.
            scale: (out, 1), fp32.
        Returns:
            (..., out) in the precision of x. Its gradient to x is computed as described in the module docstring.
        """
        y: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), self, codes, scale)  # pyright: ignore[reportAssignmentType]
        return y.view(*x.shape[:-1], len(codes))

    def gradient(self, grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """Return dL/dx of that from dL/dy, (..., out) -> (..., in), in the precision of dL/dy."""
        rounded, row_scale = self.round_rows(grad.reshape(-1, len(codes)) * scale.t(), is_ours=True)
        gradient = torch.mul(self.multiply(rounded, codes), row_scale).to(grad.dtype)
        return gradient.view(*grad.shape[:-1], codes.shape[1])

    @abstractmethod
    def round_rows(self, x: Tensor, is_ours: bool = False) -> tuple[Tensor, Tensor]:
        """Return codes (rows, n) and scale (rows, 1) in fp32, with x ~ scale * codes.

        The scale of a row that is not finite is not finite either.

        Args:
            x: (rows, n).
            is_ours: Whether x, which is then fp32, may be overwritten.
        """

    @abstractmethod
    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product of codes, (rows, n) x (n, m) -> (rows, m), in fp32 or int32."""

    def lacks(self, device: torch.device) -> str:
        """Return what is known to be missing on this device, or "" if it can be tried."""
        return ""

    def fits(self, shape: tuple[int, int]) -> bool:
        """Return whether a layer with this shape, (out, in), can be multiplied; the same on all devices."""
        return not any(width % self.multiple for width in shape)

    def unfit(self, device: torch.device) -> str:
        """Return "" if a test shows that both products can be computed on the device, else the reason."""
        if reason := self.lacks(device):
            return reason
        rows, width, height = PROBE
        x, weight = _make_probe(rows, width), _make_probe(height, width)
        try:
            codes, scale = self.round_rows(weight.to(device))
            with torch.enable_grad():
                inputs = x.to(device).requires_grad_()
                y = self(inputs, codes, scale)
                (gradient,) = torch.autograd.grad(y, inputs, y.detach())
        except Exception as error:  # missing kernels raise all kinds of errors
            return f"can't run on {device}: {reason_of(error)}"
        exact = x @ weight.t()
        error_share = max(_relative_error(y.detach().cpu(), exact), _relative_error(gradient.cpu(), exact @ weight))
        if error_share <= PROBE_ERROR:
            return ""
        return f"gives wrong results on {device} (relative error {error_share:.0%})"


class Int8Product(RoundedProduct):
    """Integers from -127 to 127, summed exactly.

    On a CPU they are multiplied in fp32, in parts short enough that nothing is rounded. The results are the same to the
    bit, and without the int8 instructions of newer CPUs this is 18 to 70 times as fast as torch's integer product
    (benchmarks/step.py).
    """

    multiple = 8  # required by cuBLAS

    def round_rows(self, x: Tensor, is_ours: bool = False) -> tuple[Tensor, Tensor]:
        scale = _scale_rows(x, torch.iinfo(torch.int8).max)
        return (x.div_(scale) if is_ours else x / scale).round_().to(torch.int8), scale

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        if a.device.type == CPU:
            return _multiply_exactly(a, b)
        rows = len(a)
        if rows < FEWEST_ROWS:
            a = F.pad(a, (0, 0, 0, FEWEST_ROWS - rows))
        return torch._int_mm(a, _to_column_major(b))[:rows]  # pyright: ignore[reportPrivateImportUsage]


class Fp8Product(RoundedProduct):
    """float8_e4m3fn, for gradients too.

    With a scale per row, three bits of mantissa are worth more than the range of e5m2.
    """

    multiple = 16  # required by cuBLAS

    def round_rows(self, x: Tensor, is_ours: bool = False) -> tuple[Tensor, Tensor]:
        highest = torch.finfo(FP8).max
        scale = _scale_rows(x, highest)
        return (x.div_(scale) if is_ours else x / scale).clamp_(-highest, highest).to(FP8), scale

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        if a.device.type == CPU:
            # Products of float8 are exact in fp32, and this takes less than half as long as torch's own product.
            return a.float() @ b.float()
        # Row scales are applied afterwards: with one scale per tensor the kernel runs on all devices with float8.
        one = torch.ones((), device=a.device)
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            a, _to_column_major(b), scale_a=one, scale_b=one, out_dtype=torch.float32
        )

    def lacks(self, device: torch.device) -> str:
        if device.type != "cuda" or torch.version.hip:
            return ""
        capability = torch.cuda.get_device_capability(device)
        return "" if capability >= ADA else (
            f"needs a GPU with compute capability 8.9 (RTX 40 series, L40, H100 and newer); "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        )  # fmt: skip


def products_problems(config: QuantizationConfig, device: torch.device) -> list[Problem]:
    """Return a problem if the level does not support these products, or this device can't compute them.

    Loads no model.
    """
    problems = config.problems()
    if problems or config.products == EXACT:
        return problems
    reason = load("products", config.products)().unfit(device)
    return [Problem("products", f"{config.products} {reason}; use exact")] if reason else []


def choose_products_(transformer: nn.Module, name: str) -> str:
    """Make every quantized layer train with these products.

    Other layers compute as before: those that are not quantized, those of modulation, and those whose widths no kernel
    supports.

    Returns:
        Which layers can't use them, as text; "" if all can.
    """
    if name == EXACT:
        return ""
    product: RoundedProduct = load("products", name)()
    layers = {
        n: m
        for n, m in transformer.named_modules()
        if isinstance(m, QuantizedLinear) and isinstance(m.format, RowScaled) and not is_kept(n, MODULATION)
    }
    unsupported = [n for n, layer in layers.items() if not product.fits((layer.out_features, layer.in_features))]
    for layer_name in layers.keys() - set(unsupported):
        layers[layer_name].product = product
    if not unsupported:
        return ""
    return (
        f"{len(unsupported)} of {len(layers)} quantized layers keep exact products, because {name} needs widths that "
        f"are multiples of {product.multiple}: {', '.join(unsupported[:3])}{' ...' if len(unsupported) > 3 else ''}"
    )


class _Product(torch.autograd.Function):
    """(rows, in) -> (rows, out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: RoundedProduct, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.product = product
        ctx.save_for_backward(codes, scale)
        rounded, row_scale = product.round_rows(x)
        return torch.mul(product.multiply(rounded, codes.t()), row_scale).mul_(scale.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.product.gradient(grads[0], *ctx.saved_tensors), None, None, None


def _scale_rows(x: Tensor, highest: float) -> Tensor:
    """Return the scale of each row, (rows, 1), fp32; never 0."""
    return (x.abs().amax(dim=-1, keepdim=True).float() / highest).clamp(min=torch.finfo(torch.float32).tiny)


def _multiply_exactly(a: Tensor, b: Tensor) -> Tensor:
    """Return the exact product of int8 (rows, n) x (n, m), in fp32 if that can represent every sum, else in int32."""
    parts = zip(a.split(EXACT_TERMS, dim=1), b.split(EXACT_TERMS, dim=0), strict=True)
    sums = [x.float() @ y.float() for x, y in parts]
    if len(sums) == 1:
        return sums[0]
    whole = sums[0].to(torch.int32)
    for part in sums[1:]:
        whole = whole + part.to(torch.int32)
    return whole


def _to_column_major(b: Tensor) -> Tensor:
    """Return the same matrix in column-major order, which 8-bit units read.

    Before compute capability 10, cuBLAS' float8 kernels support no other layout of the right factor, and its int8
    kernels do not support all shapes in other layouts.
    """
    return b if b.stride(0) == 1 else b.t().contiguous().t()


def _make_probe(rows: int, width: int) -> Tensor:
    """Return values in [-1, 1] in no particular order, the same on every machine."""
    return torch.linspace(-1, 1, rows * width)[torch.arange(rows * width) * 37 % (rows * width)].reshape(rows, width)


def _relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours - exact).norm() / exact.norm()).item()
