"""Chroma's transformer in files: what it is recognised by, its dimensions, and the original layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...adapters.files.keys import original_parameter
from ...errors import UserError
from ..loading.locate import Part, shipped_config
from ..loading.weights import Kind, Layout, Weights

TRANSFORMER = Kind("Chroma transformer", ("distilled_guidance_layer.in_proj.weight",))  # no Flux has it


def transformer_config(part: Part, weights: Weights) -> dict[str, Any]:
    """The constructor's arguments: from config.json, or read off the shapes of a single file."""
    if part.config.get("_class_name") == "ChromaTransformer2DModel":
        return part.config
    hidden, channels = shape_of(weights, *["distilled_guidance_layer.in_proj.weight"] * 2)
    return {
        **shipped_config("chroma_transformer"),
        **common_dimensions(weights),
        "approximator_num_channels": channels,
        "approximator_hidden_dim": hidden,
        "approximator_layers": weights.count("distilled_guidance_layer.layers"),
    }


def common_dimensions(weights: Weights) -> dict[str, Any]:
    """The constructor's arguments that Chroma and Flux share, read off the shapes of a file in either layout.

    Raises:
        UserError: a tensor is missing.
    """
    original = is_original(weights)
    hidden, in_channels = shape_of(weights, "x_embedder.weight", "img_in.weight")
    query_norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    head = shape_of(weights, "transformer_blocks.0.attn.norm_q.weight", query_norm)[0]
    found: dict[str, Any] = {
        "in_channels": in_channels,
        "num_layers": weights.count("double_blocks" if original else "transformer_blocks"),
        "num_single_layers": weights.count("single_blocks" if original else "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": shape_of(weights, "context_embedder.weight", "txt_in.weight")[1],
    }
    if head != 128:  # an eighth of the head for time, the rest for y and x, all even, like (16, 56, 56) of 128
        plane = (head - head // 8) // 4 * 2
        found["axes_dims_rope"] = [head - 2 * plane, plane, plane]
    return found


def shape_of(weights: Weights, ours: str, theirs: str) -> tuple[int, ...]:
    """Shape of a tensor by its name in diffusers' and in the original layout, where a norm's `scale` may be a `weight`.

    Raises:
        UserError: it is missing.
    """
    names = (theirs, theirs.replace(".scale", ".weight")) if is_original(weights) else (ours,)
    found = next((name for name in names if name in weights.entries), None)
    if found is None:
        file = weights.files[0]
        raise UserError.at(file.name, f"is no {weights.kind.name}: {names[0]} is missing ({file})")
    return weights.shape(found)


def is_original(weights: Weights) -> bool:
    """Whether the file has ComfyUI's and lodestones' names."""
    return "img_in.weight" in weights.entries


def original_layout(width: int) -> Layout:
    """Keys of ComfyUI's and lodestones' files; newer ones call a norm's scale `weight`."""

    def layout(parameter: str) -> tuple[Sequence[str], slice]:
        key, place = original_parameter(parameter)
        return (key, key.replace(".scale", ".weight")), place.rows(width)

    return layout
