"""Formats with one byte per weight and one scale per row, W ~ scale * codes, which is what all 8-bit levels use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .quantizer import Quantizer

TINY = torch.finfo(torch.float32).tiny  # scale of a row of zeros


class RowScaled(Quantizer):
    """codes: (out, in), int8 or float8; scale: (out, 1), fp32.

    Weights are encoded in fp32, whatever their precision, so that the scale is not rounded to bf16. That alone would
    cause an error of 0.2 % along whole rows, as much as the rounding to 8 bits.
    """

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        # Codes are exact in 16 bits; the product is computed in fp32 and rounded once.
        return stored["codes"].to(dtype).mul_(stored["scale"])
