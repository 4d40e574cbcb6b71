"""Read and write the header of a safetensors file without torch.

Format: 8 bytes little-endian N, N bytes of JSON (padded with spaces to a multiple of 8), then the tensors' bytes.
Source: github.com/huggingface/safetensors, README.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bounded_files import Unusable, format_size, open_regular, parse_json

# The format allows 100 MB, which take 1.5 GB as Python objects. The largest header in use is that of a cache of very
# small images (8 MB); a model of 2,000 tensors has 0.3 MB.
MAX_BYTES = 24_000_000
MAX_TENSORS, MAX_AXES = 200_000, 16
ALIGNMENT = 8
METADATA = "__metadata__"
LFS_START = b"version "  # of the text that Git LFS leaves in place of a file
LFS_FIX = "fetch it with git lfs pull"
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """The header of a file, sound or not.

    Attributes:
        tensors: Entries by name, as in the file: dtype, shape and data_offsets. Those that can't be read are left out.
        metadata: Texts by name. Other values are left out.
        start: Byte offset at which the tensors start.
        faults: What is wrong with the file, in words; empty for a sound one.
    """

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int
    faults: tuple[str, ...] = ()


def read_header(path: Path) -> Header:
    """Return what can be read of a file's header, and what is wrong with it.

    Raises:
        OSError: The file does not exist or can't be read.
        ValueError: It is not a safetensors file, or it is truncated within the header.
    """
    handle = open_regular(path)
    with os.fdopen(handle, "rb") as stream:
        file_size = os.fstat(handle).st_size
        start = stream.read(8)
        size = int.from_bytes(start.ljust(8, b"\0"), "little")
        if start == LFS_START:
            raise Unusable(f"it is a pointer of Git LFS to the file, not the file; {LFS_FIX}")
        if not 2 <= size <= max(2, file_size - 8):
            raise Unusable(f"its first 8 bytes give a header size of {size} bytes; only .safetensors files can be read")
        if size > MAX_BYTES:
            raise Unusable(f"its header is {format_size(size)} in size; the limit is {format_size(MAX_BYTES)}")
        raw = stream.read(size)
    try:
        value = parse_json(raw)
    except Unusable as error:
        raise Unusable(f"its header {error}; the file is damaged or in another format") from error
    if not isinstance(value, dict):
        raise Unusable("its header is not a JSON object; the file is damaged or in another format")
    return _examine(value, 8 + size, file_size)


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON header of a complete file, including `__metadata__` if present, and the offset of the tensors.

    Raises:
        OSError: The file does not exist or can't be read.
        ValueError: It is not a safetensors file, it is truncated, or its header is damaged.
    """
    header = read_header(path)
    if header.faults:
        raise Unusable(header.faults[0])
    return {**({METADATA: header.metadata} if header.metadata else {}), **header.tensors}, header.start


def _examine(value: dict[str, Any], start: int, file_size: int) -> Header:
    metadata = value.pop(METADATA, {})
    faults: list[str] = []
    if len(value) > MAX_TENSORS:
        raise Unusable(f"its header has {len(value)} tensors; the limit is {MAX_TENSORS}")
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        faults.append(f"its {METADATA} has values that are not texts")
    texts = {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}
    tensors = {name: entry for name, entry in value.items() if _is_entry(entry)}
    unread = [name for name in value if name not in tensors]
    if unread:
        faults.append(f"{len(unread)} of its {len(value)} tensors have no valid dtype, shape and data_offsets, such as "
                      f"{unread[0][:80]!r}")  # fmt: skip
    wrong = next((name for name, entry in tensors.items() if not _has_its_size(entry)), None)
    if wrong is not None:
        entry = tensors[wrong]
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        faults.append(f"tensor {wrong[:80]!r} ({entry['dtype'][:20]} {entry['shape'][:8]}) has {size} bytes")
    expected = start + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if expected != file_size and not unread:
        faults.append(f"its size is {file_size} bytes, but its header expects {expected}; download it again")
    return Header(tensors, texts, start, tuple(faults))


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2 or len(shape) > MAX_AXES:
        return False
    numbers = [*shape, *offsets]
    return all(type(number) is int and 0 <= number < 1 << 62 for number in numbers) and offsets[0] <= offsets[1]


def _has_its_size(entry: Mapping[str, Any]) -> bool:
    """Return whether the bytes of a tensor are as many as its shape needs. A dtype that is not known here may have any."""
    bits = DTYPE_BITS.get(entry["dtype"])
    for edge in entry["shape"]:
        bits = bits and bits * edge
    return bits is None or entry["data_offsets"][1] - entry["data_offsets"][0] == -(-bits // 8)


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """Return the start of a file, which the tensors follow."""
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw
