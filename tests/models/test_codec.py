"""The VAE: normalisation, shapes, and single files in the original layout."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.models.codec import build_vae, empty_vae, load_vae, original_vae_parameter
from chroma_trainer.trainer_core.models.loading.locate import load_shipped_config
from safetensors.torch import load_file, save_file

from tests.narrowing import of_type

CPU = torch.device("cpu")


def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_latents_are_the_mean_shifted_and_scaled(tiny_model, tiny_chroma):
    from diffusers import AutoencoderKL

    codec = load_vae(tiny_model, CPU)
    reference = AutoencoderKL.from_pretrained(tiny_chroma / "vae")
    mean: Any = reference.encode(pixels(), return_dict=False)[0].mode()  # which decode wants as a FloatTensor
    latents = codec.encode(pixels())
    torch.testing.assert_close(latents, (mean - 0.1159) * 0.3611, rtol=0, atol=1e-6)
    assert latents.shape == (2, codec.channels, 64 // codec.factor, 32 // codec.factor) == (2, 16, 8, 4)
    decoded = codec.decode(latents)
    torch.testing.assert_close(decoded, reference.decode(mean, return_dict=False)[0].clamp(-1, 1), rtol=0, atol=3e-5)
    assert decoded.shape == (2, 3, 64, 32) and decoded.dtype == latents.dtype == torch.float32
    assert not latents.requires_grad


def test_fp32_whatever_the_models_dtype(tiny_model):
    exact, narrow = load_vae(tiny_model, CPU), load_vae(replace(tiny_model, dtype="bf16"), CPU)
    assert torch.equal(exact.encode(pixels()), narrow.encode(pixels()))
    assert {parameter.dtype for parameter in narrow.vae.parameters()} == {torch.float32}


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_single_file_in_the_original_layout(tiny_model, tiny_chroma, tmp_path, prefix):
    state = load_file(tiny_chroma / "vae" / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "ae.safetensors"
    save_file({prefix + original_vae_parameter(name, 4): tensor for name, tensor in state.items()}, file)
    shutil.copy(tiny_chroma / "vae" / "config.json", tmp_path / "config.json")
    single, whole = load_vae(replace(tiny_model, repo="", vae_file=str(file)), CPU), load_vae(tiny_model, CPU)
    assert torch.equal(single.encode(pixels()), whole.encode(pixels()))


def test_dimensions_are_read_off_the_tensors(tiny_model, tmp_path):
    """Without a config: widths, levels and attention from the file, normalisation and groups from the released VAE."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config = {**load_shipped_config("flux_vae"), "block_out_channels": [32, 64, 64], "layers_per_block": 1}
    config.update(down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3)
    vae = of_type(AutoencoderKL.from_config(config), AutoencoderKL)
    state = {original_vae_parameter(name, 3): tensor for name, tensor in vae.state_dict().items()}
    for key in [key for key in state if key.endswith(("attn_1.q.weight", "attn_1.k.weight"))]:
        state[key] = state[key][..., None, None].contiguous()  # 1x1 convolutions there
    save_file(state, tmp_path / "ae.safetensors")
    codec = load_vae(replace(tiny_model, repo="", vae_file=str(tmp_path / "ae.safetensors")), CPU)
    assert (codec.factor, codec.channels, codec.shift, codec.scale) == (4, 16, 0.1159, 0.3611)
    assert torch.equal(*(each.get_parameter("encoder.conv_in.weight") for each in (codec.vae, vae)))


def test_the_shipped_config_is_the_released_vae():
    vae = build_vae(load_shipped_config("flux_vae"))
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_819_683


def test_other_blocks_are_refused():
    config = {**load_shipped_config("flux_vae"), "down_block_types": ["WoodenDownBlock2D"]}
    with pytest.raises(UserError, match=r"has layers that diffusers can't build: WoodenDownBlock2D .*; use Flux's VAE"):
        build_vae(config)


def test_the_config_alone_gives_the_shapes(tiny_model):
    empty, codec = empty_vae(tiny_model), load_vae(tiny_model, CPU)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {name: t.shape for name, t in empty.state_dict().items()} == {
        name: t.shape for name, t in codec.vae.state_dict().items()
    }


def test_building_and_loading_draw_no_random_numbers(tiny_model):
    before = torch.get_rng_state()
    load_vae(tiny_model, CPU).encode(pixels())
    assert torch.equal(torch.get_rng_state(), before)


def test_another_file_is_named(tiny_model, tiny_chroma):
    file = str(tiny_chroma / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"_model\.safetensors: is not a VAE: none of its keys is decoder\.conv_in"):
        load_vae(replace(tiny_model, vae_file=file), CPU)


# --- tiles and slices ---


def picture(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_in_tiles_and_slices(tiny_model):
    whole, tiled, sliced = (load_vae(tiny_model, CPU) for _ in range(3))
    tiled.economise_(tiling=True, slicing=False)
    sliced.economise_(tiling=False, slicing=True)
    small, large = torch.cat([picture(64, 32)] * 2), picture(64, 1024)
    assert torch.equal(tiled.encode(small), whole.encode(small))
    latents = whole.encode(large)
    # A random VAE's norms see the whole picture: tiles differ, yet mean the same picture.
    assert F.cosine_similarity(tiled.encode(large).flatten(), latents.flatten(), dim=0) > 0.99
    assert tiled.decode(latents).shape == large.shape
    torch.testing.assert_close(sliced.encode(small), whole.encode(small), rtol=0, atol=1e-5)
    torch.testing.assert_close(sliced.decode(latents), whole.decode(latents), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(512, 528), (784, 64), (16, 1040)])
def test_tiles_cover_every_shape_that_a_bucket_has(tiny_model, shape):
    """Edges are multiples of 16: the last tile may be 16 px."""
    codec = load_vae(tiny_model, CPU)
    codec.economise_(tiling=True, slicing=False)
    seen = []
    codec.vae.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2:]))
    latents = codec.encode(picture(*shape))
    assert latents.shape[2:] == (shape[0] // 8, shape[1] // 8) and latents.isfinite().all()
    assert len(seen) > 1 and max(max(edges) for edges in seen) <= 512
    assert codec.decode(latents).shape[2:] == shape
