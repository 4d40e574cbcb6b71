"""optimum-quanto's formats, bit for bit.

8 bits with a scale per row; 4 and 2 bits with a scale and an offset per 128 weights.

They are implemented here because importing optimum-quanto takes seconds and 70 MiB (it imports diffusers), and its
kernels are for inference. tests/quant/test_quanto.py compares every value with the package.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .native import Fp8Native
from .quantizer import Quantizer
from .rowwise import RowScaled, encode_rows, parts_of

GROUP = 128
INT8_MAX = 127


class Int8Quanto(RowScaled):
    """codes = round(W / scale) in -127 ... 127, scale = max |row| / 127."""

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return encode_rows(weight, INT8_MAX, torch.int8)


class Fp8Quanto(Fp8Native):
    """float8_e4m3fn with a scale per row. The package uses the same rule as Fp8Native."""


class _Grouped(Quantizer):
    """W ~ scale * codes + offset: the lowest weight of a group has code 0, the highest the last one.

    Stored tensors:
        packed: uint8, 8 / bits codes per byte. Byte (j, k) holds weight k of the groups j, j + n, j + 2n, ..., starting
            at the lowest bits, where n is the number of rows of `packed`.
        scale, offset: (groups, 1), in the weight's precision.
    """

    bits = 0

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        highest = 2**self.bits - 1
        groups = weight.reshape(-1, group_size(weight.shape[1]))
        scale, offset = groups.new_empty(len(groups), 1), groups.new_empty(len(groups), 1)
        codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
        for rows in parts_of(groups):
            exact = groups[rows].to(torch.float32, copy=True)
            low, high = exact.aminmax(dim=1, keepdim=True)
            # Round before choosing the codes, so that they compensate for it. A group of equal weights has a range of 0.
            scale[rows] = ((high - low) / highest).clamp_(min=torch.finfo(weight.dtype).tiny).to(weight.dtype)
            offset[rows] = low.to(weight.dtype)
            exact.sub_(offset[rows].float()).div_(scale[rows].float())
            codes[rows] = exact.round_().clamp_(0, highest).to(torch.uint8)
        return {"packed": self._pack(codes), "scale": scale, "offset": offset}

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        packed, mask = stored["packed"], 2**self.bits - 1
        codes = torch.cat([(packed >> shift) & mask for shift in range(0, 8, self.bits)])[: len(stored["scale"])]
        # Rounded once: addcmul computes the sum in fp32.
        decoded = torch.addcmul(stored["offset"].to(dtype), codes.to(dtype), stored["scale"].to(dtype))
        return decoded.reshape(shape)

    def _pack(self, codes: Tensor) -> Tensor:
        per_byte = 8 // self.bits
        num_rows = -(-len(codes) // per_byte)
        packed = codes.new_zeros(num_rows, codes.shape[1])
        for i, part in enumerate(codes.split(num_rows)):
            packed[: len(part)] |= part << (self.bits * i)
        return packed


class Int4Quanto(_Grouped):
    """Codes 0 ... 15."""

    bits = 4


class Int2Quanto(_Grouped):
    """Codes 0 ... 3."""

    bits = 2


def group_size(width: int) -> int:
    """Return the number of weights that share a scale, by optimum-quanto's rule.

    It is the largest of 128, 96, 64 and 32 that divides a row, or the whole row.
    """
    sizes = range(GROUP, 31, -32) if width > GROUP else ()
    return next((size for size in sizes if width % size == 0), width)
