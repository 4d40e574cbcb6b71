"""The request of a training run, and its result."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
    """All settings that determine the bytes of the LoRA.

    Equal requests with equal data and versions produce equal files.
    """

    model: ModelConfig
    dataset: DatasetConfig
    training: TrainingConfig
    validation: ValidationConfig | None = None
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values, without paths of this machine, because the file may be shared. See serialize.py."""
        return to_record(self)

    @property
    def validation_reference(self) -> str:
        """Path of the reference image for validation images, "" for none."""
        return self.validation.reference if self.validation else ""

    @property
    def sampling_model(self) -> ModelConfig | None:
        """The model that validation images are sampled with, where it is not the trained one."""
        return self.validation.sampling_model if self.validation else None

    @property
    def drawn_model(self) -> ModelConfig:
        """The model that validation images are sampled with."""
        return self.sampling_model or self.model

    @property
    def for_drawing(self) -> TrainRequest:
        """The request with the model that validation images are sampled with."""
        return replace(self, model=self.drawn_model)


@dataclass(frozen=True)
class TrainedLora:
    """A trained LoRA, or model, on disk, as nodes pass it on.

    Args:
        path: absolute path of the .safetensors file.
        name: file name as listed by ComfyUI's LoRA loaders.
        sha256: hash of the file.
        model: base model it was trained on.
        folder: folder of its run, with the checkpoints; "" for none.
        is_model: it is no LoRA but a whole transformer, which a full-rank run has trained.
    """

    path: str
    name: str
    sha256: str
    model: ModelConfig
    folder: str = ""
    is_model: bool = False
