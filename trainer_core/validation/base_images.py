"""The base model's validation images in a run's folder, so that a resumed run does not sample them again.

The grid of step 0 shows them scaled and labeled; later grids need the images themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from ..config.serialize import to_record
from ..config.validation import ValidationConfig
from ..storage.atomic import sha256_of, write_atomic
from ..storage.safetensors_header import METADATA, header_bytes, header_of
from .sample_images import Pictures

FILE = "base.safetensors"
OF_THE_LORA = ("lora_strength", "checkpoints")  # settings that do not concern the base model


def key_of(settings: ValidationConfig, versions: Mapping[str, str], device: str) -> str:
    """Return a digest of everything but the base model that decides the images. A run's folder has one base model."""
    reference = sha256_of(Path(settings.reference)) if settings.reference else ""
    record = {name: value for name, value in to_record(settings).items() if name not in OF_THE_LORA}
    parts: list[Any] = [record, list(settings.library().items()), reference, dict(versions), device]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def save_base(folder: Path, key: str, pictures: Pictures) -> None:
    """Save the images, with a digest of them.

    Raises:
        OSError: See storage.atomic.write_atomic.
    """
    tensors = {
        f"{width}x{height}.{i:06}": np.ascontiguousarray(image)
        for (width, height), images in pictures.items()
        for i, image in enumerate(images)
    }
    raw = _as_safetensors(tensors, {"key": key, "sha256": _digest(tensors)})
    write_atomic(folder / FILE, raw)


def _as_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Return a file of uint8 tensors. The safetensors package would write its metadata in random order."""
    header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))}
    start = 0
    for name in sorted(tensors):
        shape, end = list(tensors[name].shape), start + tensors[name].nbytes
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [start, end]}
        start = end
    return b"".join([header_bytes(header), *(tensors[name].tobytes() for name in sorted(tensors))])


def load_base(folder: Path, key: str) -> Pictures | None:
    """Return the images; None where there are none of this key, or the file is damaged."""
    path = folder / FILE
    try:
        metadata = header_of(path)[0].get("__metadata__")
        if not isinstance(metadata, dict) or metadata.get("key") != key:
            return None
        tensors = load(path.read_bytes())
    except (OSError, ValueError, SafetensorError):
        return None
    if _digest(tensors) != metadata.get("sha256"):
        return None
    pictures: Pictures = {}
    for name in sorted(tensors):
        width, height = map(int, name.partition(".")[0].split("x"))
        pictures.setdefault((width, height), []).append(tensors[name])
    return pictures


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].shape}".encode() + tensors[name].tobytes())
    return digest.hexdigest()
