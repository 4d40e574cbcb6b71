"""Radiance's transformer in files: how it is recognized, its dimensions, and the names of its tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..flux_lineage import block_dimensions, original_layout, shape_of
from ..loading.header_check import ANCHORS
from ..loading.weights import Kind, Layout, Weights

TRANSFORMER = Kind("Chroma Radiance transformer", ANCHORS["radiance"])
# Empty tensors whose presence says that the output is the clean image, and that text tokens have positions.
X0, SEQUENTIAL = "__x0__", "__sequential__"
OWN = ("img_in_patch.", "nerf_")  # prefixes of the layers that Chroma does not have
CONV_HEAD = "nerf_final_layer_conv.conv.weight"


def transformer_config(weights: Weights) -> dict[str, Any]:
    """Return the constructor's arguments, from the tensor shapes of a file.

    Raises:
        UserError: A tensor is missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        return shape_of(weights, name, name)

    hidden, channels = shape("distilled_guidance_layer.in_proj.weight")
    _, colors, _, patch = shape("img_in_patch.weight")
    features, embedded = shape("nerf_image_embedder.embedder.0.weight")
    return {
        **block_dimensions(weights),
        "approximator_num_channels": channels,
        "approximator_hidden_dim": hidden,
        "approximator_layers": weights.count("distilled_guidance_layer.layers"),
        "in_channels": colors,
        "patch_size": patch,
        "nerf_hidden_size": features,
        "nerf_max_freqs": math.isqrt(embedded - colors),
        "nerf_depth": weights.count("nerf_blocks"),
        "nerf_mlp_ratio": shape("nerf_blocks.0.param_generator.weight")[0] // (3 * features**2),
        "has_conv_head": CONV_HEAD in weights.entries,
        "predicts_x0": X0 in weights.entries,
        "has_text_positions": SEQUENTIAL in weights.entries,
    }


def layout_of(width: int) -> Layout:
    """Return the layout of released files: Chroma's, and Radiance's own layers by their names here."""
    chroma = original_layout(width)

    def layout(parameter: str) -> tuple[Sequence[str], slice]:
        if not parameter.startswith(OWN):
            return chroma(parameter)
        return (parameter, parameter.replace("norm.weight", "norm.scale")), slice(None)

    return layout
