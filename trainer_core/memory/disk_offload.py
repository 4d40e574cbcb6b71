"""Frozen weights that wait in files: tensors mapped from disk stand in the place of those in RAM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import UserError
from ..storage.atomic import as_os_errors
from .group_offload import find_frozen, inner_tensors, like, rebuilt


def wait_on_disk_(blocks: Sequence[nn.Module], folder: Path) -> int:
    """Write each block's frozen tensors to folder, once, and read them from there from now on. Returns the files' bytes.

    Args:
        folder: named after what decides the weights (model, precision, quantisation): a file that is there is used.
    Raises:
        UserError: the disk is full or can't be written to.
    """
    total = 0
    for i, block in enumerate(blocks):
        path = folder / f"block-{i:03}.safetensors"
        places = find_frozen(block)
        plains = [inner_tensors(place.home.detach()) for place in places]
        if not path.is_file():
            _write(path, {f"{j}.{k}": t.contiguous() for j, ts in enumerate(plains) for k, t in enumerate(ts)})
        with safe_open(path, framework="pt", device="cpu") as file:
            for j, place in enumerate(places):
                mapped = [file.get_tensor(f"{j}.{k}") for k in range(len(plains[j]))]
                place.put(like(place.home, rebuilt(place.home.detach(), mapped)))
        total += path.stat().st_size
    return total


def _write(path: Path, tensors: dict) -> None:
    staging = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with as_os_errors(staging):
            save_file(tensors, staging)
        os.replace(staging, path)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise UserError.at(
            "offload_to_disk", f"{path.parent} can't be written: {error.strerror or error}; make room, or turn it off"
        ) from error
