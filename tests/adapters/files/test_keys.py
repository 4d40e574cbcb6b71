"""Places in the original layout: rows that tile each fused weight, and names that nothing else has."""

from __future__ import annotations

import pytest
from chroma_trainer.trainer_core.adapters.files.keys import Place, original_parameter, original_place


@pytest.mark.parametrize(
    ("module", "place", "rows"),
    [
        ("transformer_blocks.3.attn.to_k", Place("double_blocks.3.img_attn.qkv", 1), slice(8, 16)),
        ("transformer_blocks.3.attn.add_v_proj", Place("double_blocks.3.txt_attn.qkv", 2), slice(16, 24)),
        ("transformer_blocks.3.ff.net.0.proj", Place("double_blocks.3.img_mlp.0"), slice(None)),
        ("transformer_blocks.3.ff_context.net.2", Place("double_blocks.3.txt_mlp.2"), slice(None)),
        ("single_transformer_blocks.37.attn.to_q", Place("single_blocks.37.linear1", 0), slice(0, 8)),
        ("single_transformer_blocks.37.proj_mlp", Place("single_blocks.37.linear1", 3), slice(24, None)),
        ("single_transformer_blocks.37.proj_out", Place("single_blocks.37.linear2"), slice(None)),
        ("proj_out", Place("final_layer.linear"), slice(None)),
        ("x_embedder", Place("img_in"), slice(None)),
        ("transformer_blocks.3.norm1.linear", Place("double_blocks.3.img_mod.lin"), slice(None)),
        ("transformer_blocks.3.norm1_context.linear", Place("double_blocks.3.txt_mod.lin"), slice(None)),
        ("single_transformer_blocks.3.norm.linear", Place("single_blocks.3.modulation.lin"), slice(None)),
        ("time_text_embed.guidance_embedder.linear_2", Place("guidance_in.out_layer"), slice(None)),
        ("norm_out.linear", Place("final_layer.adaLN_modulation.1", is_swapped=True), slice(None)),
    ],
)
def test_places(module, place, rows):
    assert original_place(module) == place
    assert place.rows(8) == rows


@pytest.mark.parametrize(
    ("parameter", "key"),
    [
        ("transformer_blocks.0.attn.norm_added_k.weight", "double_blocks.0.txt_attn.norm.key_norm.scale"),
        ("single_transformer_blocks.0.attn.norm_q.weight", "single_blocks.0.norm.query_norm.scale"),
        ("distilled_guidance_layer.norms.4.weight", "distilled_guidance_layer.norms.4.scale"),
        ("distilled_guidance_layer.layers.1.linear_2.bias", "distilled_guidance_layer.layers.1.out_layer.bias"),
        ("context_embedder.bias", "txt_in.bias"),
    ],
)
def test_parameters(parameter, key):
    assert original_parameter(parameter)[0] == key


@pytest.mark.parametrize("module", ["nowhere", "transformer_blocks.0.attn.to_x", "time_text_embed.linear"])
def test_modules_without_a_counterpart(module):
    with pytest.raises(KeyError):
        original_place(module)
