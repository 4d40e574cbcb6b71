"""The whole run as one value, and what comes out of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .adapter import AdapterConfig
from .dataset import DatasetConfig
from .memory import MemoryConfig
from .model import ModelConfig
from .optimizer import OptimizerConfig
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
        """Plain JSON values. Paths of this machine are left out: the file travels."""
        value = dataclasses.asdict(self)
        value["dataset"].pop("roots")
        value["dataset"].pop("reference_roots")
        value["dataset"].pop("mask_roots")
        if self.training.trackers == "none":  # as before there was a choice
            value["training"].pop("trackers")
        if self.model.quantization.products == "exact":  # files and folders are named and written as before there was a choice
            value["model"]["quantization"].pop("products")
        for name in ("repo", "transformer_file", "text_encoder_file", "vae_file"):
            value["model"][name] = _last_of_path(value["model"][name])
        if value["validation"] and value["validation"]["sampling"] == "as set":
            value["validation"].pop("sampling")  # as before there was a choice
        if value["validation"] and value["validation"]["attention"] == "same":
            value["validation"].pop("attention")
        if value["validation"] and not self.validation_reference:
            value["validation"].pop("reference")
        elif value["validation"]:
            value["validation"]["reference"] = _last_of_path(self.validation_reference)
        if value["model"]["flux"] is None:  # the records of other families are what they were before there was a Flux
            value["model"].pop("flux")
        else:
            for name in ("clip_file", "assistant_file"):
                value["model"]["flux"][name] = _last_of_path(value["model"]["flux"][name])
        if not self.training.rollout_probability:  # as before there were rollouts
            value["training"].pop("rollout_probability")
            value["training"].pop("rollout_steps")
        if not self.training.routed_share:  # as before there was routing
            for name in ("routed_share", "route_first", "route_last"):
                value["training"].pop(name)
        if self.adapter.precision == "fp32":  # as before there was a choice
            value["adapter"].pop("precision")
        value["adapter"]["init_lora"] = _last_of_path(value["adapter"]["init_lora"])
        for part in value["dataset"]["parts"]:
            part["folder"] = _last_of_path(part["folder"])
            part["references"] = _last_of_path(part["references"])
            if not part["references"]:
                part.pop("references")
            if not part["tag_orders"]:  # as before there were such orders
                part.pop("tag_orders")
                part.pop("kept_tags")
            part["masks"] = _last_of_path(part["masks"])
            if not part["masks"].strip():  # as before there were masks
                part.pop("masks")
                part.pop("unmasked_weight")
            if not part["prior_preservation"]:
                part.pop("prior_preservation")
            if not part["degrade"].strip():
                part.pop("degrade")
        return value

    @property
    def validation_reference(self) -> str:
        """The picture that validation pictures start from, "" for none."""
        return self.validation.reference if self.validation else ""


def _last_of_path(text: str) -> str:
    """The last name of an absolute path; a hub id or a relative name (no slash in front, no drive) as it is."""
    is_absolute = text.startswith(("/", "\\")) or text[1:2] == ":"
    return text.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] if is_absolute else text


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
