"""Chroma's transformer: 19 double and 38 single blocks (in the released model), modulated by a frozen approximator.

Parameters have the names and order of diffusers' ChromaTransformer2DModel, so that its files load;
tests/models/chroma/test_transformer.py compares the two. There are two differences to diffusers 0.42.1:

- Sigma stays in fp32. diffusers rounds it to the model's dtype before multiplying by 1000, which in bf16 is off by up
  to 3.95 of 1000. ComfyUI, where the LoRA will be used, computes the sines of sigma in fp32 and rounds those. So do we.
- Nothing is imported from diffusers (docs/decisions/0008).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mmdit_layers import (
    DoubleBlock,
    FromConfig,
    RotaryPositions,
    SingleBlock,
    modulate,
)
from ..token_routing import Detour, Route

TIMESTEPS = 1000  # the approximator was trained on sigma * 1000
ROWS_SINGLE, ROWS_STREAM, ROWS_FINAL = (
    3,
    6,
    2,
)  # modulation rows: single block, each stream of a double block, last norm


class ChromaTransformer(FromConfig):
    """Predicts the velocity of packed latents.

    The arguments are those of diffusers' config.json. Defaults are the released model's.
    """

    def __init__(
        self,
        in_channels: int = 64,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        approximator_num_channels: int = 64,
        approximator_hidden_dim: int = 5120,
        approximator_layers: int = 5,
        out_channels: int | None = None,
    ):
        super().__init__()
        width = self.inner_dim = num_attention_heads * attention_head_dim
        num_rows = num_modulation_rows(num_layers, num_single_layers)
        self.pos_embed = RotaryPositions(axes_dims_rope)
        self.time_text_embed = RowInputs(approximator_num_channels, num_rows)
        self.distilled_guidance_layer = Approximator(
            approximator_num_channels, width, approximator_hidden_dim, approximator_layers
        )
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.x_embedder = nn.Linear(in_channels, width)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(width, attention_head_dim) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, attention_head_dim) for _ in range(num_single_layers)
        )
        self.proj_out = nn.Linear(width, out_channels or in_channels)

    def restore_buffers_(self) -> None:
        """Recompute the inputs that encode the rows' indices."""
        self.time_text_embed.restore_()

    def modulation(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """Return shifts, scales and gates, (B, 3 single + 12 double + 2, hidden), which depend only on sigma (B,).

        The approximator is frozen in LoRA training, so autograd records nothing here.
        """
        return self.distilled_guidance_layer(self.time_text_embed(sigma).to(dtype))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool = False,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        route: Route | None = None,
    ) -> tuple[Tensor]:
        """Return the velocity, (B, image tokens, channels), in a tuple of one. Arguments have diffusers' names.

        Args:
            hidden_states: Packed latents, (B, image tokens, 64), in the model's dtype.
            encoder_hidden_states: Text, (B, text tokens, text width), in the model's dtype.
            timestep: Sigma in [0, 1], (B,), fp32.
            img_ids: Positions of the image tokens, (tokens, 3). Not needed with image_rotary_emb.
            txt_ids: Positions of the text tokens, (tokens, 3). Not needed with image_rotary_emb.
            attention_mask: None, or boolean (B, text + image tokens); False tokens are not attended to.
            return_dict: Must be False.
            image_rotary_emb: Cosines and sines of all tokens, (text + image tokens, head width) each.
            route: Which image tokens skip which blocks. None: no token skips a block.
        """
        assert not return_dict
        positions = image_rotary_emb
        if positions is None:
            assert img_ids is not None and txt_ids is not None
            positions = self.pos_embed(torch.cat([txt_ids, img_ids]))
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        image, final = through_blocks(self, image, text, timestep, positions, attention_mask, route)
        shift, scale = final.unbind(1)
        return (self.proj_out(modulate(image, shift, scale)),)


def through_blocks(
    transformer: Any,
    image: Tensor,
    text: Tensor,
    sigma: Tensor,
    positions: tuple[Tensor, Tensor],
    mask: Tensor | None,
    route: Route | None,
) -> tuple[Tensor, Tensor]:
    """Take embedded tokens through the blocks of Chroma or Radiance.

    Args:
        transformer: The model; see ChromaTransformer for its parts.
        image: (B, image tokens, width).
        text: (B, text tokens, width).
        sigma: (B,), fp32.
        positions: Cosines and sines of all tokens, text first.
        mask: None, or boolean (B, text + image tokens).
        route: Which image tokens skip which blocks.
    Returns:
        The image tokens, and the modulation of the last norm, (B, 2, 1, width).
    """
    num_double, num_single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    rows = transformer.modulation(sigma, image.dtype)[:, :, None]
    stream = ROWS_STREAM * num_double
    single_rows, image_rows, text_rows, final = rows.split([ROWS_SINGLE * num_single, stream, stream, ROWS_FINAL], 1)
    detour = Detour(route, positions, mask, image.shape[1])
    stream_rows = zip(image_rows.split(ROWS_STREAM, 1), text_rows.split(ROWS_STREAM, 1), strict=True)
    for index, (block, rows) in enumerate(zip(transformer.transformer_blocks, stream_rows, strict=True)):
        image = detour.at(index, image)
        text, image = block(image, text, *rows, detour.positions, detour.mask)
    joint = torch.cat([text, image], dim=1)
    joint_rows = single_rows.split(ROWS_SINGLE, 1)
    blocks = zip(transformer.single_transformer_blocks, joint_rows, strict=True)
    for index, (block, rows) in enumerate(blocks, num_double):
        joint = detour.at(index, joint)
        joint = block(joint, rows, detour.positions, detour.mask)
    joint = detour.at(num_double + num_single, joint)
    return joint[:, text.shape[1] :], final


def num_modulation_rows(num_layers: int, num_single_layers: int) -> int:
    """Return the number of rows that the approximator computes for a model of this many blocks."""
    return ROWS_SINGLE * num_single_layers + 2 * ROWS_STREAM * num_layers + ROWS_FINAL


class RowInputs(nn.Module):
    """Approximator inputs for each row: sinusoids of sigma, of a guidance that is always 0, and of the row index."""

    mod_proj: Tensor  # sinusoids of the rows' indices, (rows, channels / 2)

    def __init__(self, channels: int, num_rows: int):
        super().__init__()
        self.channels, self.num_rows = channels, num_rows
        rows = torch.empty(num_rows, channels // 2)
        self.register_buffer("mod_proj", rows, persistent=False)
        if not rows.is_meta:  # nothing to compute on the meta device, and torch would load its compiler for it
            self.restore_()

    def restore_(self) -> None:
        """Compute mod_proj."""
        self.mod_proj = waves(torch.arange(self.num_rows) * TIMESTEPS, self.channels // 2)

    def forward(self, sigma: Tensor) -> Tensor:
        """Map (B,) to (B, rows, channels), fp32."""
        sigma_inputs = [
            waves(sigma.float() * TIMESTEPS, self.channels // 4),
            waves(torch.zeros_like(sigma.float()), self.channels // 4),
        ]
        rows = self.mod_proj.to(sigma.device, torch.float32)
        same = torch.cat(sigma_inputs, dim=1)[:, None].expand(-1, self.num_rows, -1)
        return torch.cat([same, rows.expand(len(sigma), -1, -1)], dim=-1)


class Approximator(nn.Module):
    """A small residual network from row inputs to modulation. The layers it replaces are 27 % of Flux's weights."""

    def __init__(self, channels: int, width: int, hidden: int, num_layers: int):
        super().__init__()
        self.in_proj = nn.Linear(channels, hidden)
        self.layers = nn.ModuleList(_Gated(hidden) for _ in range(num_layers))
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(num_layers))
        self.out_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.out_proj(x)


class _Gated(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def waves(values: Tensor, width: int) -> Tensor:
    """Return sinusoidal embeddings of values (B,): (B, width), fp32.

    Cosines, then sines, at `width / 2` frequencies from 1 down to nearly 1/10000.
    """
    half = width // 2
    speeds = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values[:, None].float() * speeds
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
