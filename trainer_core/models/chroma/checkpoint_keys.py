"""Chroma's transformer in files: how it is recognized, and its dimensions."""

from __future__ import annotations

from typing import Any

from ..flux_lineage import common_dimensions, shape_of
from ..loading.header_check import ANCHORS
from ..loading.locate import Part, load_shipped_config
from ..loading.weights import Kind, Weights

TRANSFORMER = Kind("Chroma transformer", ANCHORS["chroma"])  # no Flux has it


def transformer_config(part: Part, weights: Weights) -> dict[str, Any]:
    """Return the constructor's arguments, from config.json or from the tensor shapes of a single file."""
    if part.config.get("_class_name") == "ChromaTransformer2DModel":
        return part.config
    hidden, channels = shape_of(weights, *["distilled_guidance_layer.in_proj.weight"] * 2)
    return {
        **load_shipped_config("chroma_transformer"),
        **common_dimensions(weights),
        "approximator_num_channels": channels,
        "approximator_hidden_dim": hidden,
        "approximator_layers": weights.count("distilled_guidance_layer.layers"),
    }
