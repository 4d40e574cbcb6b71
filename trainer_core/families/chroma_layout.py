"""Chroma's transformer in files: what it is recognised by, its dimensions, and the original layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..lora.keys import original_parameter
from ..problems import UserError
from .sources import Part, shipped_config
from .weights import Kind, Layout, Weights

TRANSFORMER = Kind("Chroma transformer", ("distilled_guidance_layer.in_proj.weight",))  # no Flux has it


def transformer_config(part: Part, weights: Weights) -> dict[str, Any]:
    """The constructor's arguments: from config.json, or read off the shapes of a single file."""
    if part.config.get("_class_name") == "ChromaTransformer2DModel":
        return part.config
    config = shipped_config("chroma_transformer")
    original = is_original(weights)

    def shape(ours: str, theirs: str) -> tuple[int, ...]:
        names = (theirs, theirs.replace(".scale", ".weight")) if original else (ours,)
        found = next((name for name in names if name in weights.entries), None)
        if found is None:
            file = weights.files[0]
            raise UserError.at(file.name, f"is no {TRANSFORMER.name}: {names[0]} is missing ({file})")
        return weights.shape(found)

    hidden, in_channels = shape("x_embedder.weight", "img_in.weight")
    head = shape("transformer_blocks.0.attn.norm_q.weight", "double_blocks.0.img_attn.norm.query_norm.scale")[0]
    approximator_hidden, approximator_channels = shape(*["distilled_guidance_layer.in_proj.weight"] * 2)
    config.update(
        in_channels=in_channels,
        num_layers=weights.count("double_blocks" if original else "transformer_blocks"),
        num_single_layers=weights.count("single_blocks" if original else "single_transformer_blocks"),
        attention_head_dim=head,
        num_attention_heads=hidden // head,
        joint_attention_dim=shape("context_embedder.weight", "txt_in.weight")[1],
        approximator_num_channels=approximator_channels,
        approximator_hidden_dim=approximator_hidden,
        approximator_layers=weights.count("distilled_guidance_layer.layers"),
    )
    if head != 128:  # an eighth of the head for time, the rest for y and x, all even, like (16, 56, 56) of 128
        plane = (head - head // 8) // 4 * 2
        config["axes_dims_rope"] = [head - 2 * plane, plane, plane]
    return config


def is_original(weights: Weights) -> bool:
    """Whether the file has ComfyUI's and lodestones' names."""
    return "img_in.weight" in weights.entries


def original_layout(width: int) -> Layout:
    """Keys of ComfyUI's and lodestones' files; newer ones call a norm's scale `weight`."""

    def layout(parameter: str) -> tuple[Sequence[str], slice]:
        key, place = original_parameter(parameter)
        return (key, key.replace(".scale", ".weight")), place.rows(width)

    return layout
