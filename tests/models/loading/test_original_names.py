"""Our tables of original names against diffusers' own converters."""

from __future__ import annotations

import json
import re

import torch
from chroma_trainer.trainer_core.adapters.files.keys import original_parameter
from chroma_trainer.trainer_core.models.codec import original_vae_parameter
from chroma_trainer.trainer_core.models.loading.locate import load_shipped_config
from safetensors.torch import load_file

from tests.narrowing import of_type

HIDDEN = 3072  # diffusers' converter knows no other width


def test_chroma_as_diffusers_converts_it():
    """Each row of the original tensors is a number of its own (one column is enough: only rows are split)."""
    from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers
    from diffusers.models.transformers.transformer_chroma import ChromaTransformer2DModel

    config = {**load_shipped_config("chroma_transformer"), "num_layers": 2, "num_single_layers": 2}
    with torch.device("meta"):
        parameters = of_type(ChromaTransformer2DModel.from_config(config), ChromaTransformer2DModel).state_dict()
    original: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        key, place = original_parameter(name)
        rows = place.rows(HIDDEN)
        end = (rows.start or 0) + parameter.shape[0] if place.part is not None else parameter.shape[0]
        shape = (max(end, original[key].shape[0]) if key in original else end, 1)
        original[key] = torch.empty(shape)
    for i, tensor in enumerate(original.values()):
        tensor[:, 0] = torch.arange(len(tensor)) + 100_000 * i
    converted = convert_chroma_transformer_checkpoint_to_diffusers(dict(original))
    assert converted.keys() == parameters.keys()
    for name, tensor in converted.items():
        key, place = original_parameter(name)
        assert torch.equal(tensor, original[key][place.rows(HIDDEN)]), name
        assert tensor.shape[0] == parameters[name].shape[0], name


def test_every_parameter_of_the_released_chroma_has_an_original_name():
    from diffusers.models.transformers.transformer_chroma import ChromaTransformer2DModel

    with torch.device("meta"):
        config = load_shipped_config("chroma_transformer")
        model = of_type(ChromaTransformer2DModel.from_config(config), ChromaTransformer2DModel)
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_899_983_424
    keys = {original_parameter(name)[0] for name, _ in model.named_parameters()}
    assert {"double_blocks.18.txt_attn.qkv.weight", "single_blocks.37.linear1.bias"} <= keys
    assert {"final_layer.linear.weight", "distilled_guidance_layer.norms.4.scale"} <= keys
    # tensors of double blocks, single blocks, embedders and final projection, approximator
    assert len(keys) == 19 * 20 + 38 * 6 + 3 * 2 + (2 + 5 * 5 + 2)


def test_vae_as_diffusers_converts_it(tiny_chroma):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config = {
        **json.loads((tiny_chroma / "vae" / "config.json").read_text(encoding="utf-8")),
        "mid_block_add_attention": True,
        "block_out_channels": [8, 16, 16, 16],  # so that there are shortcuts
    }
    state = of_type(AutoencoderKL.from_config(config), AutoencoderKL).state_dict()
    original = {}
    for name, tensor in state.items():
        is_attention = re.search(r"attentions.*to_.*weight", name)
        original[original_vae_parameter(name, 4)] = tensor[..., None, None] if is_attention else tensor
    assert len(original) == len(state)
    converted = convert_ldm_vae_checkpoint(dict(original), config)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], state[name]) for name in state)


def test_known_keys_of_the_released_vae():
    known = {
        "decoder.up_blocks.0.resnets.2.conv1.weight": "decoder.up.3.block.2.conv1.weight",
        "encoder.mid_block.attentions.0.to_out.0.bias": "encoder.mid.attn_1.proj_out.bias",
        "encoder.conv_norm_out.weight": "encoder.norm_out.weight",
    }
    assert {name: original_vae_parameter(name, 4) for name in known} == known


def test_the_tiny_model_survives_the_round_trip(tiny_chroma):
    state = load_file(tiny_chroma / "transformer" / "diffusion_pytorch_model.safetensors")
    seen = {}
    for name, tensor in state.items():
        key, place = original_parameter(name)
        rows = range(10_000)[place.rows(64)]
        for row in rows[: len(tensor)] if place.part is not None else range(len(tensor)):
            assert seen.setdefault((key, row), name) == name  # no row belongs to two
