"""One byte a weight and one scale a row: W ~ scale * codes. What 8-bit levels of all packages come to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .quantizer import Quantizer

TINY = torch.finfo(torch.float32).tiny  # the scale of a row of zeros


class RowScaled(Quantizer):
    """codes: (out, in), int8 or float8; scale: (out, 1), fp32.

    Encoded from fp32, whatever the weight's precision, so that the scale is not rounded to bf16: that alone would be off by 0.2 %
    along whole rows, as much as the rounding to 8 bits.
    """

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        # Codes are exact in 16 bits; the product is computed in fp32 and rounded once.
        return stored["codes"].to(dtype).mul_(stored["scale"])
