"""The whole run as one value, and what comes out of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .dataset import DatasetConfig
from .model import ModelConfig
from .training import TrainingConfig
from .validation import ValidationConfig


@dataclass(frozen=True)
class TrainRequest:
    """Everything that decides the bytes of the LoRA. Equal requests on equal data and versions give equal files."""

    model: ModelConfig
    dataset: DatasetConfig
    training: TrainingConfig
    validation: ValidationConfig | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values. Paths of this machine are left out: the file travels."""
        value = dataclasses.asdict(self)
        value["dataset"].pop("roots")
        for name in ("repo", "transformer_file", "text_encoder_file", "vae_file"):
            value["model"][name] = (
                value["model"][name].replace("\\", "/").rsplit("/", 1)[-1]
                if _is_path(value["model"][name])
                else value["model"][name]
            )
        return value


def _is_path(text: str) -> bool:
    """A hub id has one slash and never starts with one; a path is absolute."""
    return text.startswith(("/", "\\")) or text[1:2] == ":"


@dataclass(frozen=True)
class TrainedLora:
    """A LoRA on disk, as it travels on sockets.

    Args:
        path: the .safetensors file, absolute.
        name: as ComfyUI's LoRA loaders list it.
        sha256: of the file's bytes.
        model: the base it was trained on.
    """

    path: str
    name: str
    sha256: str
    model: ModelConfig
