"""Read and write the header of a safetensors file without torch.

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
    """Return the JSON header, including `__metadata__` if present, and the byte offset at which the tensors start.

    Raises:
        OSError: The file does not exist or can't be read.
        ValueError: It is not a safetensors file, or it is truncated within the header.
    """
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8).ljust(8, b"\0"), "little")
        if not 2 <= size <= MAX_BYTES:
            raise ValueError(
                f"its first 8 bytes give a header size of {size} bytes; only .safetensors files can be read"
            )
        raw = stream.read(size)
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ValueError("its header is not JSON; the file is damaged or in another format")
    return header, 8 + size


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """Return the start of a file, which the tensors follow."""
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw
