"""The VAE: normalisation, shapes, and single files in the original layout."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.models.loading.locate import load_shipped_config
from chroma_trainer.trainer_core.models.vae.codec import load_vae, original_vae_parameter
from chroma_trainer.trainer_core.models.vae.modules import Autoencoder
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")


def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_latents_are_the_mean_shifted_and_scaled(tiny_model, tiny_chroma):
    from diffusers import AutoencoderKL

    codec = load_vae(tiny_model, CPU)
    reference = AutoencoderKL.from_pretrained(tiny_chroma / "vae")
    mean = reference.encode(pixels()).latent_dist.mode()
    latents = codec.encode(pixels())
    torch.testing.assert_close(latents, (mean - 0.1159) * 0.3611, rtol=0, atol=1e-6)
    assert latents.shape == (2, codec.channels, 64 // codec.factor, 32 // codec.factor) == (2, 16, 8, 4)
    decoded = codec.decode(latents)
    torch.testing.assert_close(decoded, reference.decode(mean).sample.clamp(-1, 1), rtol=0, atol=3e-5)
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
    vae = AutoencoderKL.from_config(config)
    state = {original_vae_parameter(name, 3): tensor for name, tensor in vae.state_dict().items()}
    for key in [key for key in state if key.endswith(("attn_1.q.weight", "attn_1.k.weight"))]:
        state[key] = state[key][..., None, None].contiguous()  # 1x1 convolutions there
    save_file(state, tmp_path / "ae.safetensors")
    codec = load_vae(replace(tiny_model, repo="", vae_file=str(tmp_path / "ae.safetensors")), CPU)
    assert (codec.factor, codec.channels, codec.shift, codec.scale) == (4, 16, 0.1159, 0.3611)
    assert torch.equal(codec.vae.encoder.conv_in.weight, vae.encoder.conv_in.weight)


def test_the_shipped_config_is_the_released_vae():
    with torch.device("meta"):
        vae = Autoencoder(load_shipped_config("flux_vae"))
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_819_683


def test_the_same_as_diffusers_with_attention_and_uneven_widths(tmp_path):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config = {**load_shipped_config("flux_vae"), "block_out_channels": [8, 16, 16, 32], "norm_num_groups": 4}
    config.update(use_quant_conv=True, use_post_quant_conv=True)
    torch.manual_seed(0)
    theirs = AutoencoderKL.from_config(config).eval().requires_grad_(False)
    ours = Autoencoder(config)
    ours.load_state_dict(theirs.state_dict())
    mean = theirs.encode(pixels()).latent_dist.mode()
    torch.testing.assert_close(ours.mean(pixels()), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(mean), theirs.decode(mean).sample, rtol=1e-5, atol=1e-5)


def test_other_blocks_are_refused():
    config = {**load_shipped_config("flux_vae"), "down_block_types": ["AttnDownBlock2D"]}
    with pytest.raises(UserError, match="has unsupported layers: AttnDownBlock2D"):
        Autoencoder(config)


def test_another_file_is_named(tiny_model, tiny_chroma):
    file = str(tiny_chroma / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"_model\.safetensors: is not a VAE: none of its keys is decoder\.conv_in"):
        load_vae(replace(tiny_model, vae_file=file), CPU)
