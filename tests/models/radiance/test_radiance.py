"""Radiance: pixels in place of latents, files of every variant, and its own part behind the blocks."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from chroma_trainer.nodes.load_chroma import SPEC
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.flow.loss import velocity_loss
from chroma_trainer.trainer_core.flow.path import interpolate
from chroma_trainer.trainer_core.host import Paths, SinkHost
from chroma_trainer.trainer_core.lora_tools.extract import open_model
from chroma_trainer.trainer_core.models.radiance import transformer as radiance_transformer
from chroma_trainer.trainer_core.models.radiance.family import RadianceFamily
from safetensors.torch import save_file

from tests.conftest import radiance_model, write_tiny_radiance

FAMILY = RadianceFamily()
PIXELS = 64, 48


def inputs(batch: int = 2):
    generator = torch.Generator().manual_seed(1)
    text = [torch.randn(length, 32, generator=generator) for length in (5, 7)[:batch]]
    return torch.randn(batch, 3, *PIXELS, generator=generator), torch.linspace(0.7, 0.2, batch), text


@pytest.fixture
def load(tmp_path, tiny_chroma):
    def transformer(**variant):
        file = tmp_path / "radiance.safetensors"
        write_tiny_radiance(file, **variant)
        return FAMILY.load_transformer(radiance_model(file, tiny_chroma))

    return transformer


def test_pixels_come_back(tiny_radiance_model):
    codec = FAMILY.load_codec(tiny_radiance_model, torch.device("cpu"))
    pixels = torch.rand(1, 3, 16, 32) * 2 - 1
    assert torch.equal(codec.decode(codec.encode(pixels)), pixels)


@pytest.mark.parametrize(
    "variant", [{"x0": True}, {"sequential": True}, {"conv_head": True}, {"prefix": "model.diffusion_model."}]
)
def test_a_file_says_what_it_is(load, variant):
    """Each variant predicts something else, but for the prefix of keys."""
    plain, other = (FAMILY.predict(load(**values), *inputs()) for values in ({}, variant))
    assert torch.equal(plain, other) == ("prefix" in variant)


def test_clean_pixels_are_a_velocity(load):
    """v = (x - x0) / sigma, for the same weights."""
    x, sigma, text = inputs()
    clean = FAMILY.predict(load(), x, sigma, text)
    velocity = FAMILY.predict(load(x0=True), x, sigma, text)
    torch.testing.assert_close(x - sigma[:, None, None, None] * velocity, clean)


def test_the_loss_of_clean_pixels_is_that_of_their_training(load):
    """|x0 - x0_hat|^2 / (sigma + 0.05)^2, down to sigma 0; and a model of velocities has no factor."""
    transformer = load(x0=True)
    noise, _, text = inputs()
    x0 = noise.flip(2).clamp(-1, 1)
    for value in (0.9, 0.05, 1e-4):
        sigma = torch.full((2,), value)
        x_sigma, target = interpolate(x0, noise, sigma)
        velocity = FAMILY.predict(transformer, x_sigma, sigma, text)
        weight = FAMILY.loss_weight(transformer, sigma)
        assert weight is not None
        error = (x0 - (x_sigma - sigma[:, None, None, None] * velocity)).square().flatten(1).mean(1)
        torch.testing.assert_close(
            weight * velocity_loss(velocity, target), error / (value + 0.05) ** 2, rtol=1e-3, atol=1e-3
        )
    lowest = FAMILY.loss_weight(transformer, torch.zeros(1))
    assert lowest is not None and lowest.isfinite().all()
    assert FAMILY.loss_weight(load(), torch.ones(1)) is None


def test_tiles_change_nothing(load, monkeypatch):
    """The networks of 5 patches at a time, across the images of a batch, and made again for gradients."""
    transformer = load(conv_head=True)
    parameter = transformer.single_transformer_blocks[1].proj_out.weight.requires_grad_()
    results = []
    for tile in (256, 5):
        monkeypatch.setattr(radiance_transformer, "TILE_PATCHES", tile)
        velocity = FAMILY.predict(transformer, *inputs())
        results.append((velocity.detach(), *torch.autograd.grad(velocity.square().mean(), parameter)))
        with torch.no_grad():
            torch.testing.assert_close(FAMILY.predict(transformer, *inputs()), velocity.detach())
    for whole, tiled in zip(*results, strict=True):
        assert tiled.isfinite().all() and tiled.abs().max() > 0
        torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-6)


def test_colors_and_places_stay_fp32(tiny_radiance_model):
    weights = FAMILY.load_transformer(replace(tiny_radiance_model, dtype="bf16")).state_dict()
    assert weights["nerf_image_embedder.embedder.0.weight"].dtype == torch.float32
    assert weights["nerf_blocks.0.param_generator.weight"].dtype == torch.bfloat16


def test_lora_tools_open_it_as_what_it_is(tiny_radiance, tiny_radiance_model):
    """It has every layer of Chroma's blocks, and must not pass for a Chroma."""
    weights = open_model(str(tiny_radiance), "base")
    assert weights.family == "radiance" and len(weights.layers) == 1 + 2 * 12 + 2 * 5
    layer = "single_transformer_blocks.1.attn.to_v"
    plain = FAMILY.load_transformer(tiny_radiance_model).state_dict()
    assert torch.equal(weights.read(layer), plain[f"{layer}.weight"])


@pytest.fixture
def chosen(tmp_path, tiny_chroma):
    """chosen(**inputs) is what LoadChroma returns with the tiny Radiance in models/diffusion_models."""
    models = tmp_path / "models"
    for folder in ("diffusion_models", "diffusers", "vae", "text_encoders"):
        (models / folder).mkdir(parents=True)
    write_tiny_radiance(models / "diffusion_models" / "pixels.safetensors")
    shutil.copytree(tiny_chroma, models / "diffusers" / "tiny-chroma")
    save_file({"decoder.conv_in.weight": torch.zeros(8, 16, 3, 3)}, models / "vae" / "ae.safetensors")
    kinds = {folder.name: (folder,) for folder in models.iterdir()}
    host = SinkHost(paths=Paths(output=tmp_path, cache=tmp_path, models=kinds))

    def run(**values):
        (model,) = SPEC.run(SPEC.inputs(diffusion_model="pixels.safetensors", **values), host)
        return model

    return run


def test_load_chroma_recognizes_the_file(chosen):
    model = chosen(folder="tiny-chroma")
    assert (model.family, model.flavour, model.vae_file) == ("radiance", "radiance", "")
    assert FAMILY.problems(model) == []
    assert chosen(flavour="nano").repo == "lodestones/Chroma1-HD"  # nano's text encoder is too small


def test_a_vae_is_refused(chosen):
    with pytest.raises(UserError) as error:
        chosen(vae="ae.safetensors")
    assert str(error.value.problems[0]) == (
        "vae: is set, but pixels.safetensors is Chroma Radiance, which works on pixels and has no VAE; use 'from flavour'"
    )
