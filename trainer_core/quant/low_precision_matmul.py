"""Products of rounded numbers: activations and gradients go to 8 bits beside weights that are there already.

    forward    y = s_x s_w  (X_8 W_8^T)     X_8 = round(x / s_x),  s_x = max |row of x| / highest,  one for each token
    backward   dL/dx = s_g  (G_8 W_8)       G_8 = round(g / s_g),  g = dL/dy s_w,  s_g likewise

W_8 (out, in) and s_w (out, 1) are what the level stores (rows.py). The scale of W's rows lies along the sum of the backward product, so it
goes into the gradient before that is rounded. The base is frozen: no product gives a gradient of weights. Nothing is decoded and
nothing of an input is kept. Rounding is to the nearest, row by row: a token's numbers do not depend on those beside it.

Limits of types are asked for where they are used: torch.compile takes a global float for a variable, and fails on the second of two
autograd functions that read it (torch 2.13, lift_tracked_freevar_to_input).
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
PROBE = (20, 64, 96)  # rows, in, out; as few rows as a short prompt has
PROBE_ERROR = 0.1  # relative; 8 bits are off by 0.04 at most, a wrong layout by 1
EXACT_TERMS = (
    1024  # of a sum of products of int8 in fp32: 128 * 127 * 1024 < 2^24, so that every partial sum is a whole number
)
MODULATION = (
    "*norm*.linear",
)  # Flux: one row for a whole picture, whose error would be in all of its tokens; no time to gain
FEWEST_ROWS = 17  # cuBLAS takes no fewer in int8 (torch 2.5 to 2.13)
ADA = (8, 9)  # the first compute capability with float8 products


class RoundedProduct(ABC):
    """How numbers are rounded, and what multiplies them. See the module.

    Attributes:
        multiple: what both widths of a layer must be a multiple of; others stay exact.
    """

    multiple: int

    def __call__(self, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """y = x W^T with W = scale * codes.

        Args:
            x: (..., in), floating point.
            codes: (out, in), of the type that this multiplies. scale: (out, 1), fp32.
        Returns:
            (..., out) in the precision of x; its gradient to x is computed as the module says.
        """
        y: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), self, codes, scale)  # pyright: ignore[reportAssignmentType]
        return y.view(*x.shape[:-1], len(codes))

    def gradient(self, grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """dL/dx of that from dL/dy, (..., out) -> (..., in), in the precision of dL/dy."""
        rounded, row_scale = self.round_rows(grad.reshape(-1, len(codes)) * scale.t(), is_ours=True)
        found = torch.mul(self.multiply(rounded, codes), row_scale).to(grad.dtype)
        return found.view(*grad.shape[:-1], codes.shape[1])

    @abstractmethod
    def round_rows(self, x: Tensor, is_ours: bool = False) -> tuple[Tensor, Tensor]:
        """(rows, n) -> codes (rows, n), scale (rows, 1) in fp32: x ~ scale * codes. A row that is not finite has a scale that is not.

        is_ours: x, in fp32 then, may be overwritten.
        """

    @abstractmethod
    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """Codes (rows, n) x (n, m) -> (rows, m): fp32, or int32."""

    def lacks(self, device: torch.device) -> str:
        """What is known to be missing on this device, '' where it can be tried."""
        return ""

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether a layer of these widths, (out, in), can be multiplied, on every device alike."""
        return not any(width % self.multiple for width in shape)

    def unfit(self, device: torch.device) -> str:
        """'' where both products can be computed there, found by trying; else the reason in words."""
        if lacking := self.lacks(device):
            return lacking
        rows, width, height = PROBE
        x, weight = _wave(rows, width), _wave(height, width)
        try:
            codes, scale = self.round_rows(weight.to(device))
            with torch.enable_grad():
                inputs = x.to(device).requires_grad_()
                y = self(inputs, codes, scale)
                (gradient,) = torch.autograd.grad(y, inputs, y.detach())
        except Exception as error:  # kernels raise whatever they like where they are missing
            return f"can't run on {device}: {reason_of(error)}"
        exact = x @ weight.t()
        off = max(_off(y.detach().cpu(), exact), _off(gradient.cpu(), exact @ weight))
        return "" if off <= PROBE_ERROR else f"gives wrong numbers on {device} (off by {off:.0%})"


class Int8Product(RoundedProduct):
    """Whole numbers from -127 to 127, summed exactly.

    On a CPU they are multiplied in fp32, in parts so short that nothing is rounded: the same whole numbers to the bit, and
    without the int8 instructions of newer CPUs 18 to 70 times as fast as torch's integer product (benchmarks/step.py).
    """

    multiple = 8  # cuBLAS

    def round_rows(self, x: Tensor, is_ours: bool = False) -> tuple[Tensor, Tensor]:
        scale = _scale(x, torch.iinfo(torch.int8).max)
        return (x.div_(scale) if is_ours else x / scale).round_().to(torch.int8), scale

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        if a.device.type == CPU:
            return _whole_sums(a, b)
        rows = len(a)
        if rows < FEWEST_ROWS:
            a = F.pad(a, (0, 0, 0, FEWEST_ROWS - rows))
        return torch._int_mm(a, _by_columns(b))[:rows]  # pyright: ignore[reportPrivateImportUsage]


class Fp8Product(RoundedProduct):
    """float8_e4m3fn, for gradients as well: with a scale for each row three bits of mantissa are worth more than e5m2's range."""

    multiple = 16  # cuBLAS

    def round_rows(self, x: Tensor, is_ours: bool = False) -> tuple[Tensor, Tensor]:
        highest = torch.finfo(FP8).max
        scale = _scale(x, highest)
        return (x.div_(scale) if is_ours else x / scale).clamp_(-highest, highest).to(FP8), scale

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        if (
            a.device.type == CPU
        ):  # products of float8 are exact in fp32, and this takes less than half as long as torch's own
            return a.float() @ b.float()
        # Scales of rows are multiplied in afterwards: with one for each tensor the kernel runs on all devices that have float8.
        one = torch.ones((), device=a.device)
        return torch._scaled_mm(a, _by_columns(b), scale_a=one, scale_b=one, out_dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]

    def lacks(self, device: torch.device) -> str:
        if device.type != "cuda" or torch.version.hip:
            return ""
        capability = torch.cuda.get_device_capability(device)
        return "" if capability >= ADA else (
            f"needs a GPU of compute capability 8.9 (RTX 40 series, L40, H100 and newer); {torch.cuda.get_device_name(device)} has "
            f"{capability[0]}.{capability[1]}"
        )  # fmt: skip


def products_problems(config: QuantizationConfig, device: torch.device) -> list[Problem]:
    """Products that the level does not have, or that this device can't compute. Loads no model."""
    found = config.problems()
    if found or config.products == EXACT:
        return found
    reason = load("products", config.products)().unfit(device)
    return [Problem("products", f"{config.products} {reason}; use exact")] if reason else []


def choose_products_(transformer: nn.Module, name: str) -> str:
    """Let every quantised layer train with these products. Returns which can't, in words, '' where all do.

    Other layers compute as before: those that are not quantised, those of modulation, and those whose widths no kernel takes.
    """
    if name == EXACT:
        return ""
    product: RoundedProduct = load("products", name)()
    layers = {
        n: m
        for n, m in transformer.named_modules()
        if isinstance(m, QuantizedLinear) and isinstance(m.format, RowScaled) and not is_kept(n, MODULATION)
    }
    left = [n for n, layer in layers.items() if not product.fits((layer.out_features, layer.in_features))]
    for layer_name in layers.keys() - set(left):
        layers[layer_name].product = product
    if not left:
        return ""
    return (
        f"{len(left)} of {len(layers)} quantised layers keep exact products, for {name} needs widths that are multiples of "
        f"{product.multiple}: {', '.join(left[:3])}{' ...' if len(left) > 3 else ''}"
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


def _scale(x: Tensor, highest: float) -> Tensor:
    """(rows, 1), fp32; never 0."""
    return (x.abs().amax(dim=-1, keepdim=True).float() / highest).clamp(min=torch.finfo(torch.float32).tiny)


def _whole_sums(a: Tensor, b: Tensor) -> Tensor:
    """int8 (rows, n) x (n, m) exactly: fp32 where that holds every sum, else int32."""
    parts = zip(a.split(EXACT_TERMS, dim=1), b.split(EXACT_TERMS, dim=0), strict=True)
    sums = [x.float() @ y.float() for x, y in parts]
    if len(sums) == 1:
        return sums[0]
    whole = sums[0].to(torch.int32)
    for part in sums[1:]:
        whole = whole + part.to(torch.int32)
    return whole


def _by_columns(b: Tensor) -> Tensor:
    """The same matrix with its columns one after the other in memory: what 8-bit units read. cuBLAS' float8 kernels take no other right
    factor before compute capability 10, its int8 kernels not all shapes of others."""
    return b if b.stride(0) == 1 else b.t().contiguous().t()


def _wave(rows: int, width: int) -> Tensor:
    """Numbers in [-1, 1] in no order, the same everywhere."""
    return torch.linspace(-1, 1, rows * width)[torch.arange(rows * width) * 37 % (rows * width)].reshape(rows, width)


def _off(ours: Tensor, exact: Tensor) -> float:
    return ((ours - exact).norm() / exact.norm()).item()
