"""Read the header of a GGUF file without torch, with bounds on everything that is read.

Format: "GGUF", version, number of tensors, number of metadata entries, the entries, the tensors' descriptions, padding,
the tensors. All little-endian. A tensor's dimensions are stored fastest first, so they are reversed here.
Source: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

from ..bounded_files import Unusable, format_size, open_regular

MAGIC, VERSIONS, SUFFIX = b"GGUF", (2, 3), ".gguf"
MAX_BYTES = 32 << 20  # of the header: a T5's has 1.5 MB, mostly its tokenizer
MAX_TENSORS, MAX_ENTRIES, MAX_AXES, MAX_NAME, MAX_TEXT = 100_000, 100_000, 4, 512, 4096
MAX_ALIGNMENT = 1 << 16
# Type in a file -> its name, values in a block, and bytes of a block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1),
    25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
}  # fmt: skip
BLOCKS = {name: (values, size) for name, values, size in TYPES.values() if values > 1}
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a metadata value -> bytes
STRING, ARRAY, UINT32 = 8, 9, 4
ALIGNMENT, PARTS = "general.alignment", "split.count"
# llama.cpp's names of a T5 encoder -> transformers' names.
T5_NAMES = (
    (r"^enc\.blk\.(\d+)\.attn_(q|k|v|o)\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"^enc\.blk\.(\d+)\.attn_rel_b\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^enc\.blk\.(\d+)\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^enc\.blk\.(\d+)\.ffn_gate\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^enc\.blk\.(\d+)\.ffn_up\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^enc\.blk\.(\d+)\.ffn_down\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    (r"^enc\.blk\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^enc\.output_norm\.", "encoder.final_layer_norm."),
    (r"^token_embd\.", "shared."),
)  # fmt: skip


class _Reader:
    """Reads values from the start of a file, up to MAX_BYTES."""

    def __init__(self, stream: BinaryIO, file_size: int):
        self.stream, self.file_size, self.end = stream, file_size, min(file_size, MAX_BYTES)
        self.at = 0

    def raw(self, size: int) -> bytes:
        self._check(size)
        data = self.stream.read(size)
        if len(data) != size:
            raise Unusable("ends within its header; download it again")
        self.at += size
        return data

    def skip(self, size: int) -> None:
        self._check(size)
        self.stream.seek(size, os.SEEK_CUR)
        self.at += size

    def _check(self, size: int) -> None:
        if self.at + size > self.end:
            if self.file_size <= MAX_BYTES:
                raise Unusable("ends within its header; download it again")
            raise Unusable(f"has a header of more than {format_size(MAX_BYTES)}; it is damaged or in another format")

    def number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.raw(struct.calcsize(form)))[0]

    def text(self, limit: int) -> str:
        size = self.number("Q")
        if size > limit:
            raise Unusable(f"has a name of {size} bytes in its header; it is damaged or in another format")
        return self.raw(size).decode("utf-8", "replace")


def is_gguf(path: Path | str) -> bool:
    """Return whether a file's name says that it is GGUF."""
    return str(path).lower().endswith(SUFFIX)


def gguf_header_of(path: Path) -> tuple[dict[str, Any], int]:
    """Return the tensors of a GGUF file as safetensors_header.header_of does, and the offset at which they start.

    Names of a T5 are transformers' names. Dtypes that are no blocks are named as in safetensors.

    Raises:
        OSError: The file does not exist or can't be read.
        Unusable: It is not a GGUF file, it is truncated, or its header is damaged.
    """
    handle = open_regular(path)
    with os.fdopen(handle, "rb") as stream:
        reader = _Reader(stream, os.fstat(handle).st_size)
        if reader.file_size < 4 or reader.raw(4) != MAGIC:
            raise Unusable("is not a GGUF file: its first bytes are not GGUF")
        version = reader.number("I")
        if version not in VERSIONS:
            raise Unusable(f"is GGUF of version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} can be read")
        num_tensors, num_entries = reader.number("Q"), reader.number("Q")
        if num_tensors > MAX_TENSORS or num_entries > MAX_ENTRIES:
            raise Unusable(f"has {num_tensors} tensors and {num_entries} metadata entries in its header; it is damaged")
        metadata = _read_metadata(reader, num_entries)
        if metadata.get(PARTS, 1) not in (0, 1):
            raise Unusable("is one part of a model that was split into several; join them with llama.cpp's gguf-split")
        described = [_read_tensor(reader) for _ in range(num_tensors)]
        alignment = metadata.get(ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT:
            raise Unusable(f"has the alignment {alignment}; it is damaged")
        start = -(-reader.at // alignment) * alignment
    return _entries(described, start, reader.file_size), start


def _read_metadata(reader: _Reader, count: int) -> dict[str, Any]:
    """Return the entries that matter here; the others are skipped."""
    values = {}
    for _ in range(count):
        name, kind = reader.text(MAX_TEXT), reader.number("I")
        if kind == UINT32:
            values[name] = reader.number("I")
        elif kind == 2 and name == PARTS:
            values[name] = reader.number("H")
        else:
            _skip_value(reader, kind)
    return values


def _skip_value(reader: _Reader, kind: int) -> None:
    if kind in SCALARS:
        reader.skip(SCALARS[kind])
    elif kind == STRING:
        reader.skip(reader.number("Q"))
    elif kind == ARRAY:
        inner, count = reader.number("I"), reader.number("Q")
        if inner in SCALARS:
            reader.skip(SCALARS[inner] * count)
        elif inner == STRING:
            for _ in range(count):  # bounded by the header's size: each takes 8 bytes or more
                reader.skip(reader.number("Q"))
        else:
            raise Unusable("has arrays of arrays in its header, which no model has; it is damaged")
    else:
        raise Unusable(f"has a value of the unknown type {kind} in its header; it is damaged")


def _read_tensor(reader: _Reader) -> tuple[str, list[int], int, int]:
    """Return name, shape, type and offset of a tensor."""
    name, num_axes = reader.text(MAX_NAME), reader.number("I")
    if not 0 <= num_axes <= MAX_AXES:
        raise Unusable(f"has a tensor of {num_axes} axes in its header; it is damaged")
    shape = [reader.number("Q") for _ in range(num_axes)]
    return name, shape[::-1], reader.number("I"), reader.number("Q")


def _entries(described: list[tuple[str, list[int], int, int]], start: int, file_size: int) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, shape, kind, offset in described:
        if kind not in TYPES:
            raise Unusable(f"stores {name[:80]!r} in a type of blocks that is not known here (number {kind})")
        dtype, values, block_bytes = TYPES[kind]
        count = math.prod(shape)
        if count >= 1 << 50 or (values > 1 and (not shape or shape[-1] % values)):
            raise Unusable(f"has a tensor {name[:80]!r} of shape {shape} in blocks of {values}; it is damaged")
        end = offset + count // values * block_bytes
        if start + end > file_size:
            raise Unusable(
                f"ends within {name[:80]!r}: it has {file_size} bytes and needs {start + end}; download it again"
            )
        name = _own_name(name)
        if name in entries:
            raise Unusable(f"has two tensors {name[:80]!r}; it is damaged")
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
    return entries


def _own_name(name: str) -> str:
    if not name.startswith(("enc.", "token_embd.")):
        return name
    for pattern, replacement in T5_NAMES:
        name, count = re.subn(pattern, replacement, name)
        if count:
            return name
    return name
