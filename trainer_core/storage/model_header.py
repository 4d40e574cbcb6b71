"""The header of a file of model weights, safetensors or GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .gguf.header import gguf_header_of, is_gguf
from .safetensors_header import header_of


def model_header_of(path: Path) -> tuple[dict[str, Any], int]:
    """Return the tensors of a file (dtype, shape and data_offsets by name), and the offset at which they start.

    Raises:
        OSError: The file does not exist or can't be read.
        ValueError: It is in another format, truncated or damaged.
    """
    return gguf_header_of(path) if is_gguf(path) else header_of(path)
