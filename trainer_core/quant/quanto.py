"""optimum-quanto's formats: the package encodes, this module decodes.

8 bits with a scale per row; 4 and 2 bits with a scale and an offset per 128 weights.

The package is imported only to encode, once per base model, because its import takes 2.7 CPU seconds and 150 MiB.
Weights are encoded in fp32: in bf16 the package rounds the scales to bf16, which changes 2 to 7 % of the codes
(docs/decisions/0038).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, reason_of
from .quantizer import PROBE_SHAPE, Quantizer
from .rowwise import TINY, RowScaled, parts_of

GROUP = 128


class _EncodedByQuanto(Quantizer):
    extra = "quanto"
    qtype = ""  # name of the package's format

    def probe(self, encoder: torch.device | None) -> tuple[dict[str, Tensor], Tensor]:
        """Return stored tensors with made-up codes. Encoding a weight would import the package at every start."""
        empty = self.encode(torch.empty(PROBE_SHAPE, device="meta"))
        stored = {name: (torch.arange(t.numel()) % 100 + 1).reshape(t.shape).to(t.dtype) for name, t in empty.items()}
        return stored, self.decode(stored, PROBE_SHAPE, torch.float32)

    def package(self) -> tuple[Any, Any]:
        """Import optimum.quanto. Return it and the format."""
        try:
            from optimum import quanto
        except Exception as error:  # it imports large parts of transformers and diffusers
            raise UserError.at(
                "quantization",
                f"optimum-quanto can't be imported: {reason_of(error)}; install it, or choose fp8-native or none",
            ) from error
        return quanto, getattr(quanto, self.qtype)


class _RowScaledByQuanto(_EncodedByQuanto, RowScaled):
    dtype = torch.int8

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        codes = torch.empty(weight.shape, dtype=self.dtype, device=weight.device)
        scale = torch.empty(len(weight), 1, device=weight.device)
        if weight.is_meta:
            return {"codes": codes, "scale": scale}
        quanto, qtype = self.package()
        for rows in parts_of(weight):
            exact = weight[rows].float()
            scale[rows] = quanto.AbsmaxOptimizer().optimize(exact, qtype, 0).clamp(min=TINY)
            of_rows = scale[rows] if len(exact) > 1 else scale[rows].squeeze()
            codes[rows] = quanto.quantize_weight(exact, qtype, 0, of_rows, optimized=False)._data
        return {"codes": codes, "scale": scale}


class Int8Quanto(_RowScaledByQuanto):
    """codes = round(W / scale) in -127 ... 127, scale = max |row| / 127."""

    qtype = "qint8"


class Fp8Quanto(_RowScaledByQuanto):
    """float8_e4m3fn with a scale per row, max |row| / 448: the rule of Fp8Native."""

    qtype = "qfloat8_e4m3fn"
    dtype = torch.float8_e4m3fn


class _Grouped(_EncodedByQuanto):
    """W ~ scale * codes + offset: the lowest weight of a group has code 0, the highest the last one.

    Stored tensors:
        packed: uint8, 8 / bits codes per byte. Byte (j, k) holds weight k of the groups j, j + n, j + 2n, ..., starting
            at the lowest bits, where n is the number of rows of `packed`.
        scale, offset: (groups, 1), in the weight's precision.
    """

    bits = 0

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        size = group_size(weight.shape[1])
        groups = weight.reshape(-1, size)
        scale, offset = groups.new_empty(len(groups), 1), groups.new_empty(len(groups), 1)
        codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
        for rows in () if weight.is_meta else parts_of(groups):
            self._encode_part(groups[rows].float(), scale[rows], offset[rows], codes[rows])
        return {"packed": self._pack(codes), "scale": scale, "offset": offset}

    def _encode_part(self, exact: Tensor, scale: Tensor, offset: Tensor, codes: Tensor) -> None:
        """Encode some groups, (groups, size) fp32, into the last three arguments."""
        quanto, qtype = self.package()
        ranges, shift = quanto.MaxOptimizer().optimize(exact, qtype, 0)
        # Round before choosing the codes, so that they compensate for it. A group of equal weights has a range of 0.
        scale.copy_(ranges.clamp(min=torch.finfo(scale.dtype).tiny))
        offset.copy_(-shift)
        encoded = quanto.quantize_weight(
            exact, qtype, 0, scale.float(), -offset.float(), exact.shape[1], optimized=False
        )
        # Its own unpack compiles C++ or CUDA on first use: that needs a compiler and a package folder that can be
        # written.
        codes.copy_(self._unpack(encoded._data._data, len(codes)))

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes = self._unpack(stored["packed"], len(stored["scale"]))
        # Rounded once: addcmul computes the sum in fp32.
        decoded = torch.addcmul(stored["offset"].to(dtype), codes.to(dtype), stored["scale"].to(dtype))
        return decoded.reshape(shape)

    def _unpack(self, packed: Tensor, num_groups: int) -> Tensor:
        mask = 2**self.bits - 1
        return torch.cat([(packed >> shift) & mask for shift in range(0, 8, self.bits)])[:num_groups]

    def _pack(self, codes: Tensor) -> Tensor:
        per_byte = 8 // self.bits
        num_rows = -(-len(codes) // per_byte)
        packed = codes.new_zeros(num_rows, codes.shape[1])
        for i, part in enumerate(codes.split(num_rows)):
            packed[: len(part)] |= part << (self.bits * i)
        return packed


class Int4Quanto(_Grouped):
    """Codes 0 ... 15."""

    qtype, bits = "qint4", 4


class Int2Quanto(_Grouped):
    """Codes 0 ... 3."""

    qtype, bits = "qint2", 2


def group_size(width: int) -> int:
    """Return the number of weights that share a scale, by optimum-quanto's rule.

    It is the largest of 128, 96, 64 and 32 that divides a row, or the whole row.
    """
    sizes = range(GROUP, 31, -32) if width > GROUP else ()
    return next((size for size in sizes if width % size == 0), width)
