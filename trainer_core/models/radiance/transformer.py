"""Radiance's transformer: Chroma's blocks over patches of pixels, and a small network for the pixels of each patch.

The image tokens that leave the blocks hold no image yet. Each one generates the weights of a few small networks, which
turn the noisy pixels of its patch into clean ones. Source: Wang et al. 2025 (PixNerd), arXiv:2507.23268.

The blocks have Chroma's names, as in diffusers; everything else has the names of the released files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..chroma.transformer import Approximator, RowInputs, num_modulation_rows, through_blocks
from ..latent_packing import pack, unpack
from ..mmdit_layers import DoubleBlock, FromConfig, RotaryPositions, SingleBlock
from ..token_routing import Route

# Patches whose networks are in memory at once. For the released model 256 take 0.9 GB in a step, 512 twice as much.
TILE_PATCHES = 256


class RadianceTransformer(FromConfig):
    """Predicts the velocity of pixels, or the clean pixels.

    Args:
        in_channels: Channels of an image.
        patch_size: Edge of a patch in pixels.
        nerf_hidden_size: Features of a pixel.
        nerf_mlp_ratio: Hidden features of a pixel's network, as a multiple.
        nerf_depth: Number of networks, one after another.
        nerf_max_freqs: Frequencies of a pixel's position in each direction.
        has_conv_head: The last layer sees 3 x 3 pixels instead of one.
        predicts_x0: The output is the clean image instead of the velocity.
        has_text_positions: Text tokens are at (i, 0, 0) instead of (0, 0, 0).
        The others are ChromaTransformer's.
    """

    def __init__(
        self,
        in_channels: int = 3,
        patch_size: int = 16,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        approximator_num_channels: int = 64,
        approximator_hidden_dim: int = 5120,
        approximator_layers: int = 5,
        nerf_hidden_size: int = 64,
        nerf_mlp_ratio: int = 4,
        nerf_depth: int = 4,
        nerf_max_freqs: int = 8,
        has_conv_head: bool = True,
        predicts_x0: bool = False,
        has_text_positions: bool = False,
    ):
        super().__init__()
        width = self.inner_dim = num_attention_heads * attention_head_dim
        self.patch_size, self.predicts_x0, self.has_text_positions = patch_size, predicts_x0, has_text_positions
        self.pos_embed = RotaryPositions(axes_dims_rope)
        self.time_text_embed = RowInputs(approximator_num_channels, num_modulation_rows(num_layers, num_single_layers))
        self.distilled_guidance_layer = Approximator(
            approximator_num_channels, width, approximator_hidden_dim, approximator_layers
        )
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.img_in_patch = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(width, attention_head_dim) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, attention_head_dim) for _ in range(num_single_layers)
        )
        self.nerf_image_embedder = PixelEmbedder(in_channels, nerf_hidden_size, nerf_max_freqs)
        self.nerf_blocks = nn.ModuleList(
            PixelNetwork(width, nerf_hidden_size, nerf_mlp_ratio) for _ in range(nerf_depth)
        )
        if has_conv_head:
            self.nerf_final_layer_conv = ConvHead(nerf_hidden_size, in_channels)
        else:
            self.nerf_final_layer = LinearHead(nerf_hidden_size, in_channels)

    def restore_buffers_(self) -> None:
        """Recompute the inputs that encode the rows' indices."""
        self.time_text_embed.restore_()

    def modulation(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """Return shifts, scales and gates. See ChromaTransformer.modulation."""
        return self.distilled_guidance_layer(self.time_text_embed(sigma).to(dtype))

    def forward(
        self,
        pixels: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        route: Route | None = None,
    ) -> Tensor:
        """Return the velocity or the clean pixels, (B, 3, H, W), in the model's dtype.

        Args:
            pixels: Noisy pixels, (B, 3, H, W), any float dtype. H and W are multiples of the patch size.
            encoder_hidden_states: Text, (B, text tokens, text width), in the model's dtype.
            timestep: Sigma in [0, 1], (B,), fp32.
            image_rotary_emb: Cosines and sines of all tokens, text first, (text + image tokens, head width) each.
            attention_mask: None, or boolean (B, text + image tokens); False tokens are not attended to.
            route: Which image tokens skip which blocks. None: no token skips a block.
        """
        image = self.img_in_patch(pixels.to(self.img_in_patch.weight.dtype)).flatten(2).transpose(1, 2)
        text = self.context_embedder(encoder_hidden_states)
        image, _ = through_blocks(self, image, text, timestep, image_rotary_emb, attention_mask, route)
        return self.head(self._features(pixels, image))

    @property
    def head(self) -> nn.Module:
        """The last layer, which maps features of pixels, (B, features, H, W), to an image."""
        return self.nerf_final_layer_conv if hasattr(self, "nerf_final_layer_conv") else self.nerf_final_layer

    def _features(self, pixels: Tensor, image: Tensor) -> Tensor:
        """Return the features of every pixel, (B, features, H, W), from the image tokens (B, patches, width)."""
        batch, channels, height, width = pixels.shape
        patch = self.patch_size
        values = pack(pixels, patch).unflatten(2, (channels, -1)).transpose(2, 3)  # (B, patches, pixels, channels)
        tiles = zip(values.flatten(0, 1).split(TILE_PATCHES), image.flatten(0, 1).split(TILE_PATCHES), strict=True)
        # The networks' weights are 2.4 times as large as the tokens of a block, so they are made again for gradients.
        needs_gradient = torch.is_grad_enabled()
        parts = [
            checkpoint(self._tile, *tile, use_reentrant=False, preserve_rng_state=False)
            if needs_gradient
            else self._tile(*tile)
            for tile in tiles
        ]
        tokens = torch.cat(parts).transpose(1, 2).reshape(batch, image.shape[1], -1)
        return unpack(tokens, height, width, patch)

    def _tile(self, values: Tensor, tokens: Tensor) -> Tensor:
        """Map patches of pixels (N, pixels, channels) and their tokens (N, width) to (N, pixels, features)."""
        features = self.nerf_image_embedder(values).to(tokens.dtype)
        for network in self.nerf_blocks:
            features = network(features, tokens)
        return features


class PixelEmbedder(nn.Module):
    """Features of a pixel: its color and its position in the patch. Computes in fp32, as ComfyUI does."""

    def __init__(self, channels: int, width: int, num_freqs: int):
        super().__init__()
        self.num_freqs = num_freqs
        self.embedder = nn.Sequential(nn.Linear(channels + num_freqs**2, width))

    def forward(self, values: Tensor) -> Tensor:
        """Map (N, pixels, channels) to (N, pixels, width)."""
        layer: Any = self.embedder[0]  # a Linear, or a trained one (kind full)
        values = values.to(layer.weight.dtype)
        places = self.places(math.isqrt(values.shape[1]), values.device).to(values.dtype)
        return layer(torch.cat([values, places.expand(len(values), -1, -1)], dim=-1))

    def places(self, edge: int, device: torch.device) -> Tensor:
        """Return cos(pi x i) cos(pi y j) / (1 + i j) of a patch's pixels, x and y in [0, 1]: (pixels, freqs^2)."""
        frequencies = torch.arange(self.num_freqs, dtype=torch.float32, device=device)
        waves = torch.cos(torch.linspace(0, 1, edge, device=device)[:, None] * frequencies * torch.pi)
        products = waves[None, :, :, None] * waves[:, None, None, :] / (1 + frequencies[:, None] * frequencies)
        return products.reshape(edge * edge, -1)


class PixelNetwork(nn.Module):
    """A gated feed-forward layer over the pixels of each patch, whose weights the patch's token generates.

    out = x + (silu(n(x) G) * n(x) V) O,   with the columns of G, V and O normalized
    """

    def __init__(self, token_width: int, width: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.param_generator = nn.Linear(token_width, 3 * width * width * ratio)
        self.norm = nn.RMSNorm(width)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Map features (N, pixels, width) and tokens (N, token width) to features."""
        width = features.shape[2]
        gate, value, out = self.param_generator(tokens).chunk(3, dim=-1)
        gate, value = (F.normalize(part.unflatten(1, (width, -1)), dim=1) for part in (gate, value))
        out = F.normalize(out.unflatten(1, (-1, width)), dim=1)
        x = self.norm(features)
        return features + torch.bmm(F.silu(torch.bmm(x, gate)) * torch.bmm(x, value), out)


class LinearHead(nn.Module):
    """A norm and a linear layer for each pixel."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.linear = nn.Linear(width, channels)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.norm(features.movedim(1, -1))).movedim(-1, 1)


class ConvHead(nn.Module):
    """A norm, and a convolution over 3 x 3 pixels, which joins the patches without seams."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.conv = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv(self.norm(features.movedim(1, -1)).movedim(-1, 1))
