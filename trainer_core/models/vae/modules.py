"""The autoencoder of Flux and Chroma: a convolutional network with attention in the middle.

Parameters have diffusers' names (AutoencoderKL), so that its files load; tests/models/vae/test_codec.py compares the
two. Nothing is imported from diffusers: that takes longer than encoding a small dataset.

Source: Rombach et al. 2022, arXiv:2112.10752.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError

EPSILON = 1e-6


class Autoencoder(nn.Module):
    """Converts between images and latents.

    Args:
        config: diffusers' config.json of an AutoencoderKL.
    Raises:
        UserError: The config has blocks or activations that Flux and Chroma don't use.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        kinds = {*config["down_block_types"], *config["up_block_types"], config.get("act_fn", "silu")}
        if unknown := kinds - {"DownEncoderBlock2D", "UpDecoderBlock2D", "silu"}:
            raise UserError.at("vae", f"has unsupported layers: {', '.join(sorted(unknown))}; use Flux's VAE")
        widths, groups = list(config["block_out_channels"]), int(config.get("norm_num_groups", 32))
        depth, latent = int(config["layers_per_block"]), int(config["latent_channels"])
        middle = bool(config.get("mid_block_add_attention", True))
        self.encoder = Encoder(int(config.get("in_channels", 3)), 2 * latent, widths, depth, groups, middle)
        self.decoder = Decoder(latent, int(config.get("out_channels", 3)), widths, depth, groups, middle)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.get("use_quant_conv", True) else nn.Identity()
        self.post_quant_conv = (
            nn.Conv2d(latent, latent, 1) if config.get("use_post_quant_conv", True) else nn.Identity()
        )

    def mean(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, H, W) to the mean of the latent distribution, (B, channels, H / factor, W / factor)."""
        return self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, channels, h, w) to (B, 3, h * factor, w * factor)."""
        return self.decoder(self.post_quant_conv(latents))


class Encoder(nn.Module):
    def __init__(self, inputs: int, outputs: int, widths: Sequence[int], depth: int, groups: int, attends: bool):
        super().__init__()
        self.conv_in = _convolution(inputs, widths[0])
        before = [widths[0], *widths[:-1]]
        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            _Level("down", before[i], widths[i], depth, groups, resizes=i < last) for i in range(len(widths))
        )
        self.mid_block = _Middle(widths[-1], groups, attends)
        self.conv_norm_out = _norm(widths[-1], groups)
        self.conv_out = _convolution(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, inputs: int, outputs: int, widths: Sequence[int], depth: int, groups: int, attends: bool):
        super().__init__()
        widths = list(reversed(widths))
        before = [widths[0], *widths[:-1]]
        last = len(widths) - 1
        self.conv_in = _convolution(inputs, widths[0])
        self.up_blocks = nn.ModuleList(
            _Level("up", before[i], widths[i], depth + 1, groups, resizes=i < last) for i in range(len(widths))
        )
        self.mid_block = _Middle(widths[0], groups, attends)
        self.conv_norm_out = _norm(widths[-1], groups)
        self.conv_out = _convolution(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class _Level(nn.Module):
    """Residual blocks at one resolution, then resizing to half or twice of it. way: "down" or "up"."""

    def __init__(self, way: str, before: int, width: int, depth: int, groups: int, resizes: bool):
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(width if i else before, width, groups) for i in range(depth))
        self.downsamplers = nn.ModuleList([_Downsample(width)] if resizes and way == "down" else [])
        self.upsamplers = nn.ModuleList([_Upsample(width)] if resizes and way == "up" else [])

    def forward(self, x: Tensor) -> Tensor:
        for part in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = part(x)
        return x


class _Residual(nn.Module):
    def __init__(self, before: int, width: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(before, groups), _convolution(before, width)
        self.norm2, self.conv2 = _norm(width, groups), _convolution(width, width)
        self.conv_shortcut = nn.Conv2d(before, width, 1) if before != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(inner)))


class _Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = _convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Middle(nn.Module):
    def __init__(self, width: int, groups: int, attends: bool):
        super().__init__()
        self.attentions = nn.ModuleList([_Attention(width, groups)] if attends else [])
        self.resnets = nn.ModuleList(_Residual(width, width, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class _Attention(nn.Module):
    """Single-head attention over all positions, with a residual connection."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = _norm(width, groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        positions = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1 head, H W, width)
        attention = F.scaled_dot_product_attention(self.to_q(positions), self.to_k(positions), self.to_v(positions))
        return x + self.to_out[0](attention)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=EPSILON)
