"""Flux's files: diffusers' folders, the hub's cache, and ComfyUI's single files with their fused, original names."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.adapters.files.keys import original_parameter
from chroma_trainer.trainer_core.config.flux import FLAVOURS, FluxOptions
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.models.flux.family import FluxFamily
from chroma_trainer.trainer_core.models.flux.transformer import FluxTransformer
from chroma_trainer.trainer_core.models.loading.locate import load_shipped_config
from chroma_trainer.trainer_core.models.text.tokenizer import find_t5_tokenizer
from safetensors.torch import save_file

from tests.narrowing import of_type

FAMILY = FluxFamily()
WIDTH = 64
HIDDEN = 3072  # diffusers' converter knows no other width


def original(transformer, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """As ComfyUI and black-forest-labs name and fuse them: q, k, v (and mlp) stacked, shift before scale at the end."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in transformer.state_dict().items():
        key, place = original_parameter(name)
        tensor = tensor.roll(len(tensor) // 2, 0) if place.is_swapped else tensor
        found.setdefault(key, {})[place.part or 0] = tensor
    return {
        key: torch.cat([parts[i] for i in sorted(parts)]).to(dtype if key.endswith("weight") else torch.float32)
        for key, parts in found.items()
    }


def file_model(model, tensors, tmp_path):
    file = tmp_path / "flux.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return replace(model, transformer_file=str(file))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("norm", ["scale", "weight"])
def test_a_single_file_in_the_original_layout(tiny_flux_model, tmp_path, prefix, norm):
    wanted = FAMILY.load_transformer(tiny_flux_model).state_dict()
    tensors = original(FAMILY.load_transformer(tiny_flux_model))
    tensors = {prefix + key.replace(".scale", f".{norm}"): tensor for key, tensor in tensors.items()}
    model = file_model(tiny_flux_model, tensors, tmp_path)
    assert FAMILY.problems(model) == []
    found = of_type(FAMILY.load_transformer(model), FluxTransformer)
    assert found.config["guidance_embeds"] and found.state_dict().keys() == wanted.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_a_file_without_guidance_is_known_by_its_shapes(tiny_flux_model, tmp_path):
    tensors = original(FAMILY.load_transformer(tiny_flux_model))
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("guidance_in")}
    transformer = FAMILY.load_transformer(file_model(tiny_flux_model, tensors, tmp_path))
    assert not transformer.time_text_embed.has_guidance and transformer.time_text_embed.pooled_width == 16


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_scaled_fp8(tiny_flux_model, tmp_path, scale_name):
    wanted = FAMILY.load_transformer(tiny_flux_model).state_dict()
    tensors = {}
    for key, tensor in original(FAMILY.load_transformer(tiny_flux_model)).items():
        if key.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            tensors[key] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[key.removesuffix("weight") + scale_name] = scale
        else:
            tensors[key] = tensor
    tensors["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    found = FAMILY.load_transformer(file_model(tiny_flux_model, tensors, tmp_path)).state_dict()
    for name, tensor in found.items():
        assert (tensor - wanted[name]).norm() <= 0.05 * wanted[name].norm(), name
    assert not torch.equal(found["norm_out.linear.weight"], wanted["norm_out.linear.weight"])


def test_the_hubs_cache_offline(tiny_flux_model, tiny_flux, tmp_path, monkeypatch):
    from huggingface_hub import constants

    root = tmp_path / "hub" / "models--black-forest-labs--FLUX.1-dev"
    shutil.copytree(tiny_flux, root / "snapshots" / ("0" * 40))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = replace(tiny_flux_model, repo="black-forest-labs/FLUX.1-dev")
    assert FAMILY.problems(model) == []
    assert find_t5_tokenizer(model).parent.name == "tokenizer_2"
    for part in ("transformer", "text_encoder", "codec"):
        assert FAMILY.identity(model, part) == FAMILY.identity(tiny_flux_model, part)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_released_model_without_network_is_no_problem_for_a_plan(flavour, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = ModelConfig(family="flux", flavour=flavour, repo=FLAVOURS[flavour].repo, flux=FluxOptions())
    assert FAMILY.problems(model, needs_weights=False) == []
    assert {problem.field for problem in FAMILY.problems(model)} == {"repo"}
    assert FAMILY.problems(replace(model, repo="some/one"), needs_weights=False)
    assert FAMILY.empty_transformer(model) is not None


def test_a_chroma_is_no_flux(tiny_flux_model, tiny_chroma):
    file = tiny_chroma / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=r"is not a Flux transformer: none of its keys is double_blocks\.0\.img_mod"):
        FAMILY.load_transformer(replace(tiny_flux_model, transformer_file=str(file)))


def test_a_flux_that_paints_into_pictures_is_refused(tiny_flux_model, tmp_path):
    tensors = original(FAMILY.load_transformer(tiny_flux_model))
    tensors["img_in.weight"] = torch.zeros(WIDTH, 384)
    found = FAMILY.problems(file_model(tiny_flux_model, tensors, tmp_path))
    assert len(found) == 1 and "takes 384 channels per token instead of 64" in str(found[0])


def test_as_diffusers_converts_it():
    """Each row of the original tensors is a number of its own (one column is enough: only rows are split)."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    config = {**load_shipped_config("flux_transformer"), "num_layers": 2, "num_single_layers": 2}
    with torch.device("meta"):
        parameters = of_type(FluxTransformer2DModel.from_config(config), FluxTransformer2DModel).state_dict()
    rows: dict[str, int] = {}
    for name, parameter in parameters.items():
        key, place = original_parameter(name)
        begin = place.rows(HIDDEN).start or 0 if place.part is not None else 0
        rows[key] = max(rows.get(key, 0), begin + parameter.shape[0])
    numbered = {key: torch.arange(n)[:, None] + 100_000.0 * i for i, (key, n) in enumerate(rows.items())}
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(numbered))
    assert converted.keys() == parameters.keys()
    for name, tensor in converted.items():
        key, place = original_parameter(name)
        wanted = numbered[key][place.rows(HIDDEN)]
        wanted = wanted.roll(len(wanted) // 2, 0) if place.is_swapped else wanted
        assert torch.equal(tensor, wanted) and len(tensor) == parameters[name].shape[0], name


def test_a_config_beside_the_file_wins(tiny_flux_model, tiny_flux, tmp_path):
    tensors = original(FAMILY.load_transformer(tiny_flux_model))
    config = json.loads((tiny_flux / "transformer" / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "axes_dims_rope": [8, 4, 4]}), encoding="utf-8")
    transformer = of_type(FAMILY.load_transformer(file_model(tiny_flux_model, tensors, tmp_path)), FluxTransformer)
    assert transformer.pos_embed.axes == (8, 4, 4)
