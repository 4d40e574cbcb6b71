"""Decode the blocks of GGUF files, in torch and on any device. Every value is computed in fp32 and rounded once.

Each row of a weight is stored as blocks of 32 or 256 values with a scale. d and m are fp16 numbers of a block, q its
codes.

    Q8_0: d q            Q4_0: d (q - 8)      Q5_0: d (q - 16)
    Q4_1, Q5_1: d q + m
    Q4_K, Q5_K, Q2_K: (d s_i) q - (m o_i), with a scale s_i and an offset o_i for each 32 (16) values
    Q6_K, Q3_K: (d s_i) (q - 32) and (d s_i) (q - 4), with a scale for each 16 values

Source: the layouts in github.com/ggml-org/ggml, src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..packed import decode_packed as scaled
from .header import BLOCKS

CHUNK_VALUES = 1 << 24  # decoded at once: several temporaries of this size exist for a moment


@dataclass(frozen=True)
class PackedWeight:
    """A weight as a file stores it in fewer bits.

    Attributes:
        type: Name of its blocks in a GGUF file, such as "Q4_K", or of its decoder in storage/packed/decode_packed.py.
        codes: uint8, (out, bytes of a row).
        scales: Its other tensors, by their names there; a GGUF file has none.
    """

    type: str
    codes: Tensor
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def stored(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {"codes": self.codes, **self.scales}

    def decode(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the weight, (out, in)."""
        return decode_any(self.type, self.stored, shape, dtype)


def decode_any(type: str, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the weight, (out, in), of any PackedWeight's type and tensors."""
    return decode(type, stored["codes"], dtype) if type in BLOCKS else scaled.decode(type, stored, shape, dtype)


def decode(type: str, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight of these blocks, (rows, values of a row), on the codes' device. codes: uint8, (rows, bytes)."""
    values, size = BLOCKS[type]
    rows, width = codes.shape[0], codes.shape[1] // size * values
    out = torch.empty(rows, width, dtype=dtype, device=codes.device)
    if codes.is_meta:
        return out
    step = max(1, CHUNK_VALUES // max(1, width))
    for start in range(0, rows, step):
        part = codes[start : start + step]
        out[start : start + step] = DECODERS[type](part.reshape(-1, size)).reshape(len(part), width)
    return out


def unpack_(linear: nn.Linear) -> nn.Linear:
    """Decode the weight of a layer that came with its blocks alone, see load_weights_. Other layers stay as they are."""
    packed: Any = getattr(linear, "packed", None)
    if isinstance(packed, PackedWeight) and not packed.codes.is_meta:
        exact = packed.decode((linear.out_features, linear.in_features), torch.float32)
        weight = exact.to(linear.weight.dtype).reshape(linear.weight.shape)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        del linear.packed
    return linear


def _half(raw: Tensor) -> Tensor:
    """Return the fp16 numbers of (blocks, 2) bytes, fp32, (blocks, 1)."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor) -> Tensor:
    """Return the lower, then the upper four bits of each byte, (blocks, 2 x bytes)."""
    return torch.cat([raw & 15, raw >> 4], dim=1)


def _bits(raw: Tensor) -> Tensor:
    """Return the bits of each byte, lowest first, (blocks, 8 x bytes)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=raw.device)
    return ((raw[:, :, None] >> shifts) & 1).flatten(1)


def _q8_0(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * raw[:, 2:].contiguous().view(torch.int8).float()


def _q4_0(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * (_nibbles(raw[:, 2:]).float() - 8)


def _q4_1(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * _nibbles(raw[:, 4:]).float() + _half(raw[:, 2:4])


def _q5_0(raw: Tensor) -> Tensor:
    codes = _nibbles(raw[:, 6:]) | (_bits(raw[:, 2:6]) << 4)
    return _half(raw[:, :2]) * (codes.float() - 16)


def _q5_1(raw: Tensor) -> Tensor:
    codes = _nibbles(raw[:, 8:]) | (_bits(raw[:, 4:8]) << 4)
    return _half(raw[:, :2]) * codes.float() + _half(raw[:, 2:4])


def _six_bits(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8 scales and 8 offsets of 6 bits each in (blocks, 12) bytes, fp32."""
    low, middle, high = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], dim=1)
    offsets = torch.cat([middle & 63, (high >> 4) | ((middle >> 6) << 4)], dim=1)
    return scales.float(), offsets.float()


def _by_32(raw: Tensor) -> Tensor:
    """Return codes of 4 bits, (blocks, 8, 32): 32 bytes hold the lower and then the upper bits of 64 values."""
    grid = raw.reshape(-1, 4, 1, 32)
    return torch.cat([grid & 15, grid >> 4], dim=2).reshape(-1, 8, 32)


def _with_offsets(raw: Tensor, codes: Tensor) -> Tensor:
    """Return (d s) q - (m o) for codes (blocks, 8, 32) of a block that starts with d, m and the six-bit numbers."""
    scales, offsets = _six_bits(raw[:, 4:16])
    d, m = _half(raw[:, :2]) * scales, _half(raw[:, 2:4]) * offsets
    return (d[:, :, None] * codes.float() - m[:, :, None]).flatten(1)


def _q4_k(raw: Tensor) -> Tensor:
    return _with_offsets(raw, _by_32(raw[:, 16:]))


def _q5_k(raw: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=raw.device)[None, :, None]
    fifth = (raw[:, 16:48][:, None, :] >> shifts) & 1  # bit i of byte j belongs to value j of the i-th 32
    return _with_offsets(raw, _by_32(raw[:, 48:]) | (fifth << 4))


def _q6_k(raw: Tensor) -> Tensor:
    low, high = raw[:, :128].reshape(-1, 2, 64), raw[:, 128:192].reshape(-1, 2, 1, 32)
    nibbles = torch.cat([low & 15, low >> 4], dim=2).reshape(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=raw.device)[None, None, :, None]
    codes = (nibbles | (((high >> shifts) & 3) << 4)).float() - 32
    scales = raw[:, 192:208].contiguous().view(torch.int8).float()
    return ((_half(raw[:, 208:]) * scales)[:, :, None] * codes.reshape(-1, 16, 16)).flatten(1)


def _pairs_of_bits(raw: Tensor) -> Tensor:
    """Return codes of 2 bits, (blocks, 16, 16): 32 bytes hold bits 0-1, then 2-3, 4-5 and 6-7 of 128 values."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=raw.device)[None, None, :, None]
    return ((raw.reshape(-1, 2, 1, 32) >> shifts) & 3).reshape(-1, 16, 16)


def _q2_k(raw: Tensor) -> Tensor:
    scales, codes = raw[:, :16], _pairs_of_bits(raw[:, 16:80]).float()
    d, m = _half(raw[:, 80:82]) * (scales & 15).float(), _half(raw[:, 82:84]) * (scales >> 4).float()
    return (d[:, :, None] * codes - m[:, :, None]).flatten(1)


def _q3_k(raw: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=raw.device)[None, :, None]
    third = ((raw[:, :32][:, None, :] >> shifts) & 1).reshape(-1, 16, 16)
    codes = (_pairs_of_bits(raw[:, 32:96]) | (third << 2)).float() - 4
    packed = raw[:, 96:108]
    low = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], dim=1)
    high = torch.cat([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
    scales = (low | (high << 4)).float() - 32
    return ((_half(raw[:, 108:]) * scales)[:, :, None] * codes).flatten(1)


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k,
    "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
