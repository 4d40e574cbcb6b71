"""Flux.1's transformer: Chroma's blocks, each with its own modulation from sigma, guidance and pooled text.

Parameters have the names and order of diffusers' FluxTransformer2DModel; tests/models/flux/test_transformer.py compares
the two. As in Chroma's transformer, sigma (and guidance) stay in fp32 until their sinusoids are computed, and nothing
is imported from diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.layer import AdapterLayer
from ..chroma.transformer import ROWS_FINAL, ROWS_SINGLE, ROWS_STREAM, TIMESTEPS, waves
from ..mmdit_layers import (
    DoubleBlock,
    FeedForward,
    FromConfig,
    JointAttention,
    RotaryPositions,
    SelfAttention,
    SingleBlock,
    modulate,
)
from ..token_routing import Detour, Route

WAVES = 256  # sinusoidal features of sigma * 1000 and guidance * 1000


class FluxTransformer(FromConfig):
    """Predicts the velocity of packed latents.

    The arguments are those of diffusers' config.json. Defaults are the released dev model's.
    """

    def __init__(
        self,
        in_channels: int = 64,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = True,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        out_channels: int | None = None,
    ):
        super().__init__()
        width = self.inner_dim = num_attention_heads * attention_head_dim
        self.pos_embed = RotaryPositions(axes_dims_rope)
        self.time_text_embed = Conditioning(width, pooled_projection_dim, guidance_embeds)
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.x_embedder = nn.Linear(in_channels, width)
        self.transformer_blocks = nn.ModuleList(FluxDoubleBlock(width, attention_head_dim) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleBlock(width, attention_head_dim) for _ in range(num_single_layers)
        )
        self.norm_out = Modulation(width, ROWS_FINAL)
        self.proj_out = nn.Linear(width, out_channels or in_channels)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool = False,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        route: Route | None = None,
    ) -> tuple[Tensor]:
        """Return the velocity, (B, image tokens, channels), in a tuple of one. Arguments have diffusers' names.

        Args:
            hidden_states: Packed latents, (B, image tokens, 64), in the model's dtype.
            encoder_hidden_states: Text, (B, text tokens, text width), in the model's dtype.
            pooled_projections: Pooled embedding of the whole prompt, (B, pooled width), in the model's dtype.
            timestep: Sigma in [0, 1], (B,), fp32.
            img_ids: Positions of the image tokens, (tokens, 3). Not needed with image_rotary_emb.
            txt_ids: Positions of the text tokens, (tokens, 3). Not needed with image_rotary_emb.
            guidance: (B,), fp32, such as 3.5. None for a model without a guidance embedding.
            attention_mask: None, or boolean (B, text + image tokens); False tokens are not attended to.
            return_dict: Must be False.
            image_rotary_emb: Cosines and sines of all tokens, (text + image tokens, head width) each.
            route: Which image tokens skip which blocks. None: no token skips a block.
        """
        assert not return_dict
        num_double = len(self.transformer_blocks)
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        conditioning = F.silu(self.time_text_embed(timestep, guidance, pooled_projections))
        positions = image_rotary_emb
        if positions is None:
            assert img_ids is not None and txt_ids is not None
            positions = self.pos_embed(torch.cat([txt_ids, img_ids]))
        detour = Detour(route, positions, attention_mask, image.shape[1])
        for index, block in enumerate(self.transformer_blocks):
            image = detour.at(index, image)
            text, image = block(image, text, conditioning, detour.positions, detour.mask)
        joint = torch.cat([text, image], dim=1)
        for index, block in enumerate(self.single_transformer_blocks, num_double):
            joint = detour.at(index, joint)
            joint = block(joint, conditioning, detour.positions, detour.mask)
        joint = detour.at(num_double + len(self.single_transformer_blocks), joint)
        scale, shift = self.norm_out(conditioning).unbind(1)  # original files have the reverse order
        return (self.proj_out(modulate(joint[:, text.shape[1] :], shift, scale)),)


class Modulation(nn.Module):
    """Maps conditioning to rows of shifts, scales and gates. 27 % of the released model's weights."""

    def __init__(self, width: int, num_rows: int):
        super().__init__()
        self.num_rows = num_rows
        self.linear = nn.Linear(width, num_rows * width)

    def forward(self, conditioning: Tensor) -> Tensor:
        """Map (B, width), after its SiLU, to (B, rows, 1, width)."""
        return self.linear(conditioning).unflatten(-1, (self.num_rows, 1, -1))


class FluxDoubleBlock(DoubleBlock):
    """Text and image tokens in separate streams, with joint attention and two modulations."""

    def __init__(self, width: int, head_width: int):
        nn.Module.__init__(self)  # the base's parts, in the order of diffusers' parameters
        self.norm1, self.norm1_context = Modulation(width, ROWS_STREAM), Modulation(width, ROWS_STREAM)
        self.attn = JointAttention(width, head_width)
        self.ff, self.ff_context = FeedForward(width), FeedForward(width)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image: Tensor,
        text: Tensor,
        conditioning: Tensor,
        positions: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (text, image). conditioning: (B, width)."""
        rows = self.norm1(conditioning), self.norm1_context(conditioning)
        return super().forward(image, text, *rows, positions, mask)

    def unread_layers(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, image: Tensor, text: Tensor, conditioning: Tensor, *_: Any
    ) -> list[nn.Module]:
        is_trained = any(learning(norm) for norm in (self.norm1, self.norm1_context))
        return [] if is_trained else super().unread_layers(image, text, conditioning, conditioning)


class FluxSingleBlock(SingleBlock):
    """One stream of tokens, with attention and feed-forward in parallel, and one modulation."""

    def __init__(self, width: int, head_width: int):
        nn.Module.__init__(self)
        self.norm = Modulation(width, ROWS_SINGLE)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)
        self.attn = SelfAttention(width, head_width)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, joint: Tensor, conditioning: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """Map (B, tokens, width) to the same shape. conditioning: (B, width)."""
        return super().forward(joint, self.norm(conditioning), positions, mask)

    def unread_layers(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, joint: Tensor, conditioning: Tensor, *_: Any
    ) -> list[nn.Module]:
        return [] if learning(self.norm) else super().unread_layers(joint, conditioning)


def learning(module: nn.Module) -> bool:
    """Return whether any parameter of the module is trained, by autograd or where its weights wait in RAM."""
    parts = module.modules()
    return any(part.requires_grad for part in module.parameters()) or any(isinstance(x, AdapterLayer) for x in parts)


class Conditioning(nn.Module):
    """Conditioning of all blocks: the sum of the embeddings of sigma, guidance and pooled text."""

    def __init__(self, width: int, pooled_width: int, has_guidance: bool):
        super().__init__()
        self.timestep_embedder = _Embedder(WAVES, width)
        if has_guidance:
            self.guidance_embedder = _Embedder(WAVES, width)
        self.text_embedder = _Embedder(pooled_width, width)
        self.has_guidance, self.pooled_width = has_guidance, pooled_width

    def forward(self, sigma: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """Map (B,), (B,) or None, and (B, pooled width) to (B, width), in the dtype of `pooled`."""
        assert (guidance is not None) == self.has_guidance
        conditioning = self.timestep_embedder(waves(sigma.float() * TIMESTEPS, WAVES).to(pooled.dtype))
        if guidance is not None:
            conditioning = conditioning + self.guidance_embedder(
                waves(guidance.float() * TIMESTEPS, WAVES).to(pooled.dtype)
            )
        return conditioning + self.text_embedder(pooled)


class _Embedder(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(channels, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))
