"""The whole run as one value, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .adapter import AdapterConfig
from .dataset import DatasetConfig
from .memory import MemoryConfig
from .model import ModelConfig
from .optimizer import OptimizerConfig
from .serialize import to_record
from .training import TrainingConfig
from .validation import ValidationConfig


@dataclass(frozen=True)
class TrainRequest:
    """Everything that decides the bytes of the LoRA. Equal requests on equal data and versions give equal files."""

    model: ModelConfig
    dataset: DatasetConfig
    training: TrainingConfig
    validation: ValidationConfig | None = None
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values. Paths of this machine are left out: the file travels. See record.py."""
        return to_record(self)

    @property
    def validation_reference(self) -> str:
        """The picture that validation pictures start from, "" for none."""
        return self.validation.reference if self.validation else ""


@dataclass(frozen=True)
class TrainedLora:
    """A LoRA on disk, as it travels on sockets.

    Args:
        path: the .safetensors file, absolute.
        name: as ComfyUI's LoRA loaders list it.
        sha256: of the file's bytes.
        model: the base it was trained on.
        folder: of its run, where the checkpoints are; "" where there is none.
    """

    path: str
    name: str
    sha256: str
    model: ModelConfig
    folder: str = ""
