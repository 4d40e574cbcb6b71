"""Flux's transformer in files: how it is recognized, and its dimensions."""

from __future__ import annotations

from typing import Any

from ..flux_lineage import common_dimensions, shape_of
from ..loading.header_check import GUIDANCE
from ..loading.locate import Part, load_shipped_config
from ..loading.weights import Kind, Weights

# The first key is in the original layout (also ComfyUI's), the second in diffusers'. No Chroma has either.
TRANSFORMER = Kind(
    "Flux transformer", ("double_blocks.0.img_mod.lin.weight", "transformer_blocks.0.norm1.linear.weight")
)


def flux_config(part: Part, weights: Weights) -> dict[str, Any]:
    """Return the constructor's arguments, from config.json or from the tensor shapes of a single file."""
    if part.config.get("_class_name") == "FluxTransformer2DModel":
        return part.config
    pooled = "time_text_embed.text_embedder.linear_1.weight", "vector_in.in_layer.weight"
    return {
        **load_shipped_config("flux_transformer"),
        **common_dimensions(weights),
        "out_channels": shape_of(weights, "proj_out.weight", "final_layer.linear.weight")[0],
        "pooled_projection_dim": shape_of(weights, *pooled)[1],
        "guidance_embeds": any(name in weights.entries for name in GUIDANCE),
    }
