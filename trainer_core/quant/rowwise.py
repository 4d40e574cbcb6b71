"""Formats with one byte per weight and one scale per row, W ~ scale * codes, which is what all 8-bit levels use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .quantizer import Quantizer

TINY = torch.finfo(torch.float32).tiny  # scale of a row of zeros
# Weights that are encoded at once. On a CPU the temporaries of a part stay in its cache, and their memory is used again
# for the next part. On a GPU they are a quarter GB, and few kernels are launched.
PART_WEIGHTS, PART_WEIGHTS_GPU = 1 << 18, 1 << 26


def parts_of(weight: Tensor) -> Iterator[slice]:
    """Yield the rows that are encoded at once. On the meta device these are all rows."""
    if weight.is_meta:
        yield slice(None)
        return
    size = PART_WEIGHTS if weight.device.type == "cpu" else PART_WEIGHTS_GPU
    count = max(1, size // weight.shape[1])
    for start in range(0, len(weight), count):
        yield slice(start, start + count)


class RowScaled(Quantizer):
    """codes: (out, in), int8 or float8; scale: (out, 1), fp32.

    Weights are encoded in fp32, whatever their precision, so that the scale is not rounded to bf16. That alone would
    cause an error of 0.2 % along whole rows, as much as the rounding to 8 bits.
    """

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        # Codes are exact in 16 bits; the product is computed in fp32 and rounded once.
        return stored["codes"].to(dtype).mul_(stored["scale"])
