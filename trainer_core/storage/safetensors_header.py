"""The header of a safetensors file, read and written without torch.

Format: 8 bytes little-endian N, N bytes of JSON (padded with spaces to a multiple of 8), then the tensors' bytes.
Source: github.com/huggingface/safetensors, README.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_BYTES = 100_000_000  # the format's own limit
ALIGNMENT = 8


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header, with `__metadata__` where there is one, and the byte at which the tensors begin.

    Raises:
        OSError: no such file, or not to be read.
        ValueError: no safetensors file, or one cut short within its header.
    """
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8).ljust(8, b"\0"), "little")
        if not 2 <= size <= MAX_BYTES:
            raise ValueError(f"its first 8 bytes say a header of {size} bytes; only .safetensors files are read")
        raw = stream.read(size)
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ValueError("its header is not JSON; it is damaged or of another format")
    return header, 8 + size


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """What a file begins with; the tensors follow."""
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw
