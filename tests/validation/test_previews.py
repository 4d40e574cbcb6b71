"""Previews while an image is sampled: close to the image, of either kind, and without any effect on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from chroma_trainer.nodes import validate_sampler
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.data.cache.latents import to_tensor
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import ASSETS, Notice, Paths, SinkHost
from chroma_trainer.trainer_core.models.codec import load_vae
from chroma_trainer.trainer_core.paths import find_taef1, local_paths
from chroma_trainer.trainer_core.validation.base_images import key_of
from chroma_trainer.trainer_core.validation.previews import LinearColors, Preview, TinyDecoder, preview_of
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional


@pytest.fixture(scope="module")
def codec():
    """chroma-nano's VAE."""
    return load_vae(ModelConfig(family="chroma", flavour="nano", repo=str(ASSETS / "chroma-nano")), torch.device("cpu"))


def host_of(tmp_path):
    events = []
    return SinkHost(Paths(tmp_path, tmp_path), sinks=(events.append,)), events


def test_the_colors_are_those_of_the_image(codec):
    """A linear map explains most of the colors, also of mirrored images of other colors than it was fitted to."""
    colors = LinearColors(codec)
    for folder, channels, least in (
        ("plain-emoji", [0, 1, 2], 0.85),
        ("plain-emoji", [1, 2, 0], 0.5),
        ("neon-emoji", [0, 1, 2], 0.75),
    ):
        paths = sorted((ASSETS / folder).glob("*.png"))[::4]
        pixels = torch.stack([to_tensor(Image.open(path).convert("RGB")) for path in paths])[:, channels].flip(-1)
        wanted, preview = functional.avg_pool2d(pixels, codec.factor), colors(codec.encode(pixels))
        assert preview.shape == wanted.shape
        spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum()
        assert 1 - (preview - wanted).square().sum() / spread > least, (folder, channels)


def test_fitting_is_repeatable_and_leaves_the_random_state(codec):
    before = torch.random.get_rng_state()
    assert torch.equal(LinearColors(codec).weight, LinearColors(codec).weight)
    assert torch.equal(before, torch.random.get_rng_state())


def test_at_most_two_a_second(tmp_path):
    now, (host, events) = [10.0], host_of(tmp_path)
    preview = Preview(lambda latents: latents[:, :3], tmp_path / "preview.jpg", host, lambda: now[0])
    for step, at in enumerate((10.0, 10.2, 10.49, 10.5, 10.9, 11.0), 1):
        now[0] = at
        preview(step, 6, torch.zeros(1, 16, 4, 6))
    assert [(event.step, event.num_steps) for event in events] == [(1, 6), (4, 6), (6, 6)]
    with Image.open(tmp_path / "preview.jpg") as image:
        assert image.format == "JPEG" and image.size == (512, 341)
    assert [path.name for path in tmp_path.iterdir()] == ["preview.jpg"]


def test_a_preview_that_fails_is_reported_once_and_ends_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    host, events = host_of(tmp_path)
    preview = Preview(lambda latents: latents[:, :3], tmp_path / "file" / "preview.jpg", host)
    for step in (1, 2):
        preview(step, 2, torch.zeros(1, 16, 4, 4))
    assert [type(event) for event in events] == [Notice] and "not affected" in events[0].text


@pytest.fixture(scope="module")
def tiny():
    from diffusers import AutoencoderTiny  # pyright: ignore[reportPrivateImportUsage]

    torch.manual_seed(0)
    return AutoencoderTiny(latent_channels=16).eval()


def comfyui_names(decoder) -> dict:
    """ComfyUI's file: a plain sequence, whose first layer has no weights."""
    names = {name: name.removeprefix("layers.").partition(".") for name in decoder.state_dict()}
    return {f"{int(names[name][0]) + 1}.{names[name][2]}": tensor for name, tensor in decoder.state_dict().items()}


@pytest.mark.parametrize("kind", ["comfyui", "diffusers"])
def test_the_tiny_autoencoder_in_either_form(tiny, tmp_path, kind):
    file = tmp_path / "taef1_decoder.safetensors"
    save_file(comfyui_names(tiny.decoder) if kind == "comfyui" else tiny.state_dict(), file)
    latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = tiny.decode(latents).sample.clamp(-1, 1)
    assert torch.equal(TinyDecoder(file)(latents), expected) and expected.shape == (1, 3, 32, 48)


@pytest.mark.parametrize("what", ["encoder", "other", "damaged"])
def test_another_file_is_refused(tiny, tmp_path, what):
    file = tmp_path / "taef1_decoder.safetensors"
    if what == "damaged":
        file.write_bytes(b"{" * 100)
    else:
        save_file(tiny.encoder.state_dict() if what == "encoder" else {"1.weight": torch.zeros(3)}, file)
    with pytest.raises(UserError, match=r"taef1_decoder\.safetensors"):
        TinyDecoder(file)


def test_a_missing_file_is_reported_before_anything_is_loaded(tmp_path):
    (tmp_path / "models" / "vae_approx").mkdir(parents=True)
    host = SinkHost(local_paths([tmp_path / "models"], tmp_path))
    inputs = validate_sampler.Inputs(prompts="a", previews="taef1")
    (problem,) = validate_sampler.preflight(inputs, host)
    assert problem.field == "previews" and "vae_approx" in problem.message and "taesd" in problem.message
    for name in ("taef1_decoder.safetensors", "taef1_encoder.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / "models" / "vae_approx" / name)
    assert find_taef1(host.paths).name == "taef1_decoder.safetensors"
    assert validate_sampler.preflight(inputs, host) == []


def test_taef1_needs_flux_latents(codec, tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "channels", 4)
    with pytest.raises(UserError, match="decodes 16 latent channels, and this VAE has 4"):
        preview_of(ValidationConfig(prompts="a", previews="taef1"), codec, tmp_path / "x", host_of(tmp_path)[0])


def test_it_is_no_part_of_what_is_sampled():
    off, fast = (ValidationConfig(prompts="a", previews=kind) for kind in ("off", "fast"))
    assert key_of(off, {}, "cpu") == key_of(fast, {}, "cpu")
    last = [field.name for field in validate_sampler.SPEC.fields()][-4:]
    assert last == ["previews", "score", "score_model", "sampling_model"]


def test_black_and_white(codec):
    colors = LinearColors(codec)
    for value in (-1.0, 0.0, 1.0):
        preview = colors(codec.encode(torch.full((1, 3, 64, 64), value)))
        assert abs(float(preview.mean()) - value) < 0.15, value
    assert np.isfinite(colors.weight.numpy()).all()
