"""The 16-channel VAE of Flux and Chroma: converts between images and latents, with diffusers' AutoencoderKL."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config.model import ModelConfig
from ..errors import UserError
from .loading.fingerprint import identity_of
from .loading.locate import Part, describe, find_part, load_shipped_config
from .loading.weights import VAE, Weights, load_weights_

TILE_EDGE = 512  # pixels


class VaeCodec:
    """Latents are z' = (z - shift) * scale, where z is the mean of the encoder's distribution.

    The VAE computes in fp32 regardless of the model's dtype: its weights are small, and it overflows in fp16.

    Args:
        vae: diffusers' AutoencoderKL.
        config: Its config.json.
        device: Device on which it runs.
    """

    def __init__(self, vae: Any, config: Mapping[str, Any], device: torch.device):
        # Channels last: a quarter faster on a CPU, and the preferred format of convolutions on GPUs.
        self.vae = vae.to(device, memory_format=torch.channels_last)
        self.device = device
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)
        self.channels = int(config["latent_channels"])
        self.shift, self.scale = float(config.get("shift_factor") or 0.0), float(config["scaling_factor"])

    def move_(self, device: torch.device) -> None:
        """Move the VAE to a device."""
        self.vae, self.device = self.vae.to(device), device

    def economise_(self, tiling: bool, slicing: bool) -> None:
        """Enable tiles of 512 px that overlap by a quarter, or processing one image at a time, to save memory."""
        self.vae.use_tiling, self.vae.use_slicing = tiling, slicing
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = TILE_EDGE, TILE_EDGE // self.factor

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, H, W) in [-1, 1] to (B, channels, H / factor, W / factor), fp32, on the CPU."""
        mean = self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist.mode()
        return ((mean - self.shift) * self.scale).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, channels, h, w) to (B, 3, h * factor, w * factor) in [-1, 1], fp32, on the CPU."""
        z = latents.to(self.device, torch.float32) / self.scale + self.shift
        return self.vae.decode(z).sample.clamp(-1, 1).cpu()


def load_vae(model: ModelConfig, device: torch.device) -> VaeCodec:
    """Load the VAE of a model's repo or single file.

    Raises:
        UserError: Files are missing or don't match.
    """
    part = find_part(model, "vae")
    weights = Weights(part.files, VAE)
    is_original = "decoder.mid.block_1.conv1.weight" in weights.entries
    config = _config(part, weights)
    vae = build_vae(config)
    num_levels = len(config["block_out_channels"])
    load_weights_(
        vae,
        weights,
        dtype=lambda name: torch.float32,
        layout=lambda name: ((original_vae_parameter(name, num_levels) if is_original else name,), slice(None)),
    )
    return VaeCodec(vae, config, device)


def empty_vae(model: ModelConfig) -> nn.Module:
    """Return the VAE on the meta device, as load_vae would load it."""
    return build_vae(vae_config(model))


def build_vae(config: Mapping[str, Any]) -> Any:
    """Return diffusers' AutoencoderKL with its parameters on the meta device.

    Args:
        config: diffusers' config.json of an AutoencoderKL.
    Raises:
        UserError: diffusers does not support its layers.
    """
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]

    try:
        with init_empty_weights():
            return AutoencoderKL.from_config(dict(config))
    except ValueError as error:
        raise UserError.at("vae", f"has layers that diffusers can't build: {error}; use Flux's VAE") from error


def vae_config(model: ModelConfig) -> dict[str, Any]:
    """Return diffusers' config of a model's VAE, which determines all shapes.

    Reads file headers, and imports neither diffusers nor accelerate.

    Raises:
        UserError: See find_part.
    """
    part = describe(model, "vae", load_shipped_config("flux_vae"))
    return _config(part, Weights(part.files, VAE))


def codec_identity(model: ModelConfig) -> str:
    """Return a digest of what determines a latent: weights, normalization, the mean, and the implementation."""
    part = find_part(model, "vae")
    config = part.config or load_shipped_config("flux_vae")
    return identity_of(part.files, f"diffusers' mean, ({config.get('shift_factor')}, {config.get('scaling_factor')})")


def original_vae_parameter(name: str, num_levels: int) -> str:
    """Return a diffusers parameter's key in the original layout (ae.safetensors), which counts up blocks in reverse."""

    def up(match: re.Match[str]) -> str:
        return f"decoder.up.{num_levels - 1 - int(match[1])}."

    rules: Sequence[tuple[str, Any]] = (
        (r"decoder\.up_blocks\.(\d+)\.", up),
        (r"encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1."),
        (r"\.mid_block\.resnets\.(\d+)\.", lambda match: f".mid.block_{int(match[1]) + 1}."),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
        (r"\.resnets\.(\d+)\.", r".block.\1."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.conv_norm_out\.", ".norm_out."),
        (r"\.group_norm\.", ".norm."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".proj_out."),
    )
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _config(part: Part, weights: Weights) -> dict[str, Any]:
    if part.config.get("_class_name") == "AutoencoderKL":
        return part.config
    keys = weights.entries
    if "decoder.mid.block_1.conv1.weight" not in keys:  # diffusers names without a config: assume the released VAE
        return load_shipped_config("flux_vae")
    num_levels = weights.count("encoder.down")
    channels = [weights.shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(num_levels)]
    return {
        **load_shipped_config("flux_vae"),
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "layers_per_block": weights.count("encoder.down.0.block"),
        "latent_channels": weights.shape("decoder.conv_in.weight")[1],
        "mid_block_add_attention": "decoder.mid.attn_1.q.weight" in keys,
    }
