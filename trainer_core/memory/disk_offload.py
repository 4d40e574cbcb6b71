"""Disk offload: frozen weights are written to files and memory-mapped instead of held in RAM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import UserError
from ..storage.atomic import as_os_errors, rename
from .group_offload import find_frozen, inner_tensors, like, rebuilt


def wait_on_disk_(blocks: Mapping[int, nn.Module], folder: Path) -> int:
    """Write each block's frozen tensors to a folder once, and replace them by tensors mapped from the files.

    Args:
        blocks: The blocks, by their index in the model.
        folder: Must be named after everything that decides the weights (model, precision, quantization): existing files
            are reused.
    Returns:
        Total size of the files in bytes.
    Raises:
        UserError: The disk is full or not writable.
    """
    total = 0
    for i, block in blocks.items():
        path = folder / f"block-{i:03}.safetensors"
        slots = find_frozen(block)
        plains = [inner_tensors(slot.home.detach()) for slot in slots]
        if not path.is_file():
            _write(path, {f"{j}.{k}": t.contiguous() for j, ts in enumerate(plains) for k, t in enumerate(ts)})
        with safe_open(path, framework="pt", device="cpu") as file:
            for j, slot in enumerate(slots):
                mapped = [file.get_tensor(f"{j}.{k}") for k in range(len(plains[j]))]
                slot.put(like(slot.home, rebuilt(slot.home.detach(), mapped)))
        total += path.stat().st_size
    return total


def _write(path: Path, tensors: dict) -> None:
    staging = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with as_os_errors(staging):
            save_file(tensors, staging)
        rename(staging, path)
    except OSError as error:
        with suppress(OSError):
            staging.unlink(missing_ok=True)
        raise UserError.at(
            "offload_to_disk",
            f"can't write to {path.parent}: {error.strerror or error}; free disk space, or turn offload_to_disk off",
        ) from error
