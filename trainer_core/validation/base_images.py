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
from safetensors.numpy import load, save

from ..config.serialize import to_record
from ..config.validation import ValidationConfig
from ..storage.atomic import replace_atomic, sha256_of
from ..storage.safetensors_header import header_of
from .sample_images import Pictures

FILE = "base.safetensors"
DIGESTS = "digests"  # metadata: of the settings, and of the images
OF_THE_LORA = ("lora_strength", "checkpoints")  # settings that do not concern the base model


def key_of(settings: ValidationConfig, versions: Mapping[str, str], device: str, sampling_model: str = "") -> str:
    """Return a digest of everything but the base model that decides the images. A run's folder has one base model.

    Args:
        sampling_model: digest of the model that samples, where it is not the base model.
    """
    reference = sha256_of(Path(settings.reference)) if settings.reference else ""
    record = {name: value for name, value in to_record(settings.of_the_images()).items() if name not in OF_THE_LORA}
    parts: list[Any] = [record, list(settings.library().items()), reference, dict(versions), device]
    parts += [sampling_model] if sampling_model else []
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def save_base(folder: Path, key: str, pictures: Pictures) -> None:
    """Save the images, with a digest of them.

    Raises:
        OSError: See storage.atomic.replace_atomic.
    """
    tensors = {
        f"{width}x{height}.{i:06}": np.ascontiguousarray(image)
        for (width, height), images in pictures.items()
        for i, image in enumerate(images)
    }
    metadata = {DIGESTS: f"{key} {_digest(tensors)}"}  # one entry: safetensors writes several in a random order
    replace_atomic(folder / FILE, lambda temporary: temporary.write_bytes(save(tensors, metadata)))


def load_base(folder: Path, key: str) -> Pictures | None:
    """Return the images; None where there are none of this key, or the file is damaged."""
    path = folder / FILE
    try:
        metadata = header_of(path)[0].get("__metadata__")
        tensors = load(path.read_bytes())
    except (OSError, ValueError, SafetensorError):
        return None
    if not isinstance(metadata, dict) or metadata.get(DIGESTS) != f"{key} {_digest(tensors)}":
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
