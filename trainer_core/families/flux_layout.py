"""Flux's transformer in files: what it is recognised by, its dimensions, and the original layout."""

from __future__ import annotations

from typing import Any

from ..problems import UserError
from .chroma_layout import is_original
from .sources import Part, shipped_config
from .weights import Kind, Weights

# The first is ComfyUI's and the original's, the second diffusers'; no Chroma has either.
TRANSFORMER = Kind(
    "Flux transformer", ("double_blocks.0.img_mod.lin.weight", "transformer_blocks.0.norm1.linear.weight")
)
GUIDANCE = ("guidance_in.in_layer.weight", "time_text_embed.guidance_embedder.linear_1.weight")


def flux_config(part: Part, weights: Weights) -> dict[str, Any]:
    """The constructor's arguments: from config.json, or read off the shapes of a single file."""
    if part.config.get("_class_name") == "FluxTransformer2DModel":
        return part.config
    config = shipped_config("flux_transformer")
    original = is_original(weights)

    def shape(ours: str, *theirs: str) -> tuple[int, ...]:
        names = theirs if original else (ours,)
        found = next((name for name in names if name in weights.entries), None)
        if found is None:
            file = weights.files[0]
            raise UserError.at(file.name, f"is no {TRANSFORMER.name}: {names[0]} is missing ({file})")
        return weights.shape(found)

    hidden, in_channels = shape("x_embedder.weight", "img_in.weight")
    norm = "double_blocks.0.img_attn.norm.query_norm"
    head = shape("transformer_blocks.0.attn.norm_q.weight", f"{norm}.scale", f"{norm}.weight")[0]
    config.update(
        in_channels=in_channels,
        out_channels=shape("proj_out.weight", "final_layer.linear.weight")[0],
        num_layers=weights.count("double_blocks" if original else "transformer_blocks"),
        num_single_layers=weights.count("single_blocks" if original else "single_transformer_blocks"),
        attention_head_dim=head,
        num_attention_heads=hidden // head,
        joint_attention_dim=shape("context_embedder.weight", "txt_in.weight")[1],
        pooled_projection_dim=shape("time_text_embed.text_embedder.linear_1.weight", "vector_in.in_layer.weight")[1],
        guidance_embeds=any(name in weights.entries for name in GUIDANCE),
    )
    if head != 128:  # as in chroma_layout.py
        plane = (head - head // 8) // 4 * 2
        config["axes_dims_rope"] = [head - 2 * plane, plane, plane]
    return config
