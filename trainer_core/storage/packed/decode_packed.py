"""Decode weights of ComfyUI's quantized files and of bitsandbytes, in torch and on any device.

Every value is computed in fp32 and rounded once. q are codes, s scales:

    int8          q s, with a scale for each row
    int8-rotN     (q s) H, in groups of N values of a row; H is the regular Hadamard matrix, which is its own inverse
    int4-rotN     the same, with two codes in a byte, the first one in the lower bits
    mxfp8         q 2^(s - 127), with a scale for each 32 values; q is e4m3
    nvfp4         q (t s), with a scale s (e4m3) for each 16 values and one scale t for the weight; q is e2m1, two in a
                  byte, the first one in the upper bits
    4bit-table    table[q] s, of bitsandbytes: nf4 and fp4, two in a byte, the first one in the upper bits

Source of the rotation: ConvRot, arXiv:2512.03673. Of mxfp8: OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from .packed_header import TILE, Packed

CHUNK_VALUES = 1 << 24  # decoded at once: several temporaries of this size exist for a moment
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
WHOLE = ("table",)  # tensors without a row for each row of the weight
ROTATED = "-rot"  # before the size of a rotation, in the name of a type

Read = Callable[[str], Tensor]


def stored_of(packed: Packed, codes: Tensor, read: Read) -> dict[str, Tensor]:
    """Return the tensors that `decode` takes, each with a row for each row of the weight except for tables.

    Args:
        packed: How the weight is stored.
        codes: The tensor of the weight.
        read: Reads the tensor of a key.
    """
    rows, columns = packed.shape
    codes = codes.view(torch.uint8).reshape(rows, -1)
    if packed.type == "4bit-table":
        return {
            "codes": codes,
            "scale": _bnb_scales(packed, read).reshape(rows, -1),
            "table": read(packed.scales["table"]).float(),
        }
    scale = read(packed.scales["scale"])
    if packed.type in ("mxfp8", "nvfp4"):
        block = 32 if packed.type == "mxfp8" else 16
        stored = {"codes": codes, "scale": _untiled(scale.view(torch.uint8), rows, columns // block)}
        if packed.type == "nvfp4":
            stored["whole"] = read(packed.scales["whole"]).float().reshape(1, 1).expand(rows, 1).contiguous()
        return stored
    return {"codes": codes, "scale": scale.float().reshape(-1, 1).expand(rows, 1).contiguous()}


def empty_stored(packed: Packed) -> dict[str, Tensor]:
    """Return the tensors of stored_of on the meta device, for the memory estimate."""
    rows, columns = packed.shape
    eight = packed.type.startswith(("mxfp8", "int8"))

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    stored = {"codes": tensor(rows, columns if eight else columns // 2, dtype=torch.uint8)}
    if packed.type in ("mxfp8", "nvfp4"):
        stored["scale"] = tensor(rows, columns // (32 if eight else 16), dtype=torch.uint8)
        return stored | ({"whole": tensor(rows, 1)} if "whole" in packed.scales else {})
    if packed.type == "4bit-table":
        return stored | {"scale": tensor(rows, columns // packed.block), "table": tensor(16)}
    return stored | {"scale": tensor(rows, 1)}


def decode(type: str, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the weight, (out, in), on the device of the stored tensors. For `stored`, see stored_of."""
    codes = stored["codes"]
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    if codes.is_meta:
        return out
    rows, columns = shape
    name, _, rotation = type.partition(ROTATED)
    step = max(1, CHUNK_VALUES // max(1, columns))
    for start in range(0, rows, step):
        part = {key: value if key in WHOLE else value[start : start + step] for key, value in stored.items()}
        values = DECODERS[name](part).reshape(-1, columns)
        out[start : start + step] = _rotate(values, int(rotation)) if rotation else values
    return out


def _int8(part: Mapping[str, Tensor]) -> Tensor:
    return part["codes"].view(torch.int8).float() * part["scale"]


def _int4(part: Mapping[str, Tensor]) -> Tensor:
    codes = part["codes"]
    values = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).to(torch.int8)
    return torch.where(values > 7, values - 16, values).float() * part["scale"]


def _mxfp8(part: Mapping[str, Tensor]) -> Tensor:
    exponents = part["scale"].to(torch.int32)
    scales = (exponents << 23).view(torch.float32)  # the bits of a power of two; 0 stays 0, as ComfyUI has it
    values = part["codes"].view(torch.float8_e4m3fn).float()
    return values.unflatten(1, (-1, 32)) * scales[:, :, None]


def _nvfp4(part: Mapping[str, Tensor]) -> Tensor:
    table = torch.tensor(E2M1, device=part["codes"].device)
    scales = part["whole"] * part["scale"].view(torch.float8_e4m3fn).float()
    return table[_upper_first(part["codes"])].unflatten(1, (-1, 16)) * scales[:, :, None]


def _table(part: Mapping[str, Tensor]) -> Tensor:
    values, scale = part["table"][_upper_first(part["codes"])], part["scale"]
    return values.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]


DECODERS: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "int8": _int8, "int4": _int4, "mxfp8": _mxfp8, "nvfp4": _nvfp4, "4bit-table": _table,
}  # fmt: skip


def _upper_first(codes: Tensor) -> Tensor:
    """Return the upper, then the lower four bits of each byte, as indices."""
    return torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1).int()


def _rotate(values: Tensor, size: int) -> Tensor:
    return torch.matmul(values.unflatten(1, (-1, size)), hadamard(size).to(values.device)).flatten(1)


@cache
def hadamard(size: int) -> Tensor:
    """Return the regular Hadamard matrix of a size that is a power of 4, divided by its square root. It is symmetric."""
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    matrix = four
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / size**0.5


def _untiled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Return the scales (rows, columns) of tiles of 128 x 4, which store row 32 a + b of a tile in row b, at column 4 a.

    Source: the layout of block scaling factors in the documentation of cuBLAS.
    """
    down, across = -(-rows // TILE[0]), -(-columns // TILE[1])
    tiles = scales.reshape(down, across, 32, 4, 4).transpose(2, 3).reshape(down, across, *TILE)
    return (
        tiles.transpose(1, 2).reshape(down * TILE[0], -1)[:rows, :columns].clone(memory_format=torch.contiguous_format)
    )


def _bnb_scales(packed: Packed, read: Read) -> Tensor:
    """Return the scales of bitsandbytes' blocks, fp32: as stored, or themselves codes with scales."""
    scale = read(packed.scales["scale"])
    if not packed.nested:
        return scale.float()
    table, outer = read(packed.scales["outer_table"]).float(), read(packed.scales["outer"]).float()
    return table[scale.int()] * outer.repeat_interleave(packed.nested)[: len(scale)] + packed.offset
