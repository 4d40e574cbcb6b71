"""Level auto, where there is no training whose plan could choose: by what the weights take."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..config.model import AUTO, ModelConfig
from ..devices import total_bytes
from .loading import Source

FINEST_FIRST = {"none": 1.0, "int8-quanto": 0.53, "int4-quanto": 0.3}  # level -> bytes, as a share of the model's own
SHARE = 0.7  # of the memory, for the weights; pictures, the VAE and the system have the rest


def with_level_to_draw(
    model: ModelConfig, family: Source, device: torch.device, trained: ModelConfig | None = None
) -> ModelConfig:
    """The model with a level that can be loaded: that which a LoRA was trained with, else the finest whose weights leave room.

    Args:
        trained: the LoRA's own base.
    """
    if model.quantization.level != AUTO:
        return model
    if trained:
        level = trained.quantization.level
    else:
        width = 4 if model.dtype == "fp32" else 2
        size = width * sum(parameter.numel() for parameter in family.empty_transformer(model).parameters())
        room = SHARE * total_bytes(device)
        level = next((level for level, share in FINEST_FIRST.items() if share * size <= room), list(FINEST_FIRST)[-1])
    return replace(model, quantization=replace(model.quantization, level=level))
