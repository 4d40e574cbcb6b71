"""Resolve level "auto" where no training plan can choose it: by the size of the weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..config.model import AUTO, ModelConfig
from ..devices import total_bytes
from .loading import Source

FINEST_FIRST = {"none": 1.0, "int8-quanto": 0.53, "int4-quanto": 0.3}  # level -> size, as a share of the original
SHARE = 0.7  # of the memory, for the weights; the rest is for images, the VAE and the system


def with_level_to_draw(
    model: ModelConfig, family: Source, device: torch.device, trained: ModelConfig | None = None
) -> ModelConfig:
    """Return the model with a level that can be loaded for sampling.

    This is the level that a LoRA was trained with, or else the finest one whose weights leave enough memory.

    Args:
        model: The model.
        family: Its family.
        device: Where it is loaded.
        trained: The base model that a LoRA was trained on.
    """
    if model.quantization.level != AUTO:
        return model
    if trained:
        level = trained.quantization.level
    else:
        width = 4 if model.dtype == "fp32" else 2
        size = width * sum(parameter.numel() for parameter in family.shared_transformer(model).parameters())
        room = SHARE * total_bytes(device)
        level = next((level for level, share in FINEST_FIRST.items() if share * size <= room), list(FINEST_FIRST)[-1])
    return replace(model, quantization=replace(model.quantization, level=level))
