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


def encode_rows(weight: Tensor, largest: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return codes and scale of a weight: codes = W / scale, scale = max |row| / largest, in fp32.

    Args:
        weight: (out, in), floating point. It is not changed.
        largest: Largest code.
        dtype: Type of the codes. Codes of an integer type are rounded to nearest, and the lowest is -largest - 1.
    """
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scale = torch.empty(len(weight), 1, device=weight.device)
    for rows in parts_of(weight):
        exact = weight[rows].to(torch.float32, copy=True)
        low, high = exact.aminmax(dim=1, keepdim=True)
        scale[rows] = (torch.maximum(-low, high) / largest).clamp_(min=TINY)
        exact.div_(scale[rows])
        if dtype.is_floating_point:
            exact.clamp_(-largest, largest)
        else:
            exact.round_().clamp_(-largest - 1, largest)
        codes[rows] = exact.to(dtype)
    return {"codes": codes, "scale": scale}


class RowScaled(Quantizer):
    """codes: (out, in), int8 or float8; scale: (out, 1), fp32.

    Weights are encoded in fp32, whatever their precision, so that the scale is not rounded to bf16. That alone would
    cause an error of 0.2 % along whole rows, as much as the rounding to 8 bits.
    """

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        # Codes are exact in 16 bits; the product is computed in fp32 and rounded once.
        return stored["codes"].to(dtype).mul_(stored["scale"])
