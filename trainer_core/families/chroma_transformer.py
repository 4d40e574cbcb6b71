"""Chroma's transformer: diffusers' modules, with a forward that keeps sigma in fp32.

diffusers 0.42.1 rounds sigma to the model's dtype before it multiplies by 1000; in bf16 that is off by up to 3.95 of
1000. ComfyUI, where the LoRA will be used, takes the sines of sigma in fp32 and rounds those. So do we.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_chroma
from torch import Tensor

TIMESTEPS = 1000  # the approximator was trained on sigma * 1000


# The same name as its parent's: save_pretrained writes it into the config.
class ChromaTransformer2DModel(transformer_chroma.ChromaTransformer2DModel):
    """19 double and 38 single blocks (in the released model), modulated by an approximator of (sigma, row index)."""

    def restore_buffers_(self) -> None:
        """Compute `mod_proj` anew: it is in no file, so a model built on the meta device lacks it."""
        embed: Any = self.time_text_embed
        num_rows, width = embed.mod_proj.shape
        embed.mod_proj = get_timestep_embedding(
            torch.arange(num_rows) * TIMESTEPS, width, flip_sin_to_cos=True, downscale_freq_shift=0
        )

    def modulation(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of shifts, scales and gates, (B, 3 single + 12 double + 2, hidden), from sigma (B,) alone.

        The approximator is frozen in LoRA training, so autograd records nothing here.
        """
        embed: Any = self.time_text_embed
        time = embed.time_proj(sigma.float() * TIMESTEPS)
        guidance = embed.guidance_proj(torch.zeros_like(sigma, dtype=torch.float32))
        rows = embed.mod_proj.to(sigma.device, torch.float32)
        shared = torch.cat([time, guidance], dim=1)
        vectors = torch.cat([shared[:, None].expand(-1, len(rows), -1), rows.expand(len(sigma), -1, -1)], dim=-1)
        return self.distilled_guidance_layer(vectors.to(dtype))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity of packed latents.

        Args:
            hidden_states: packed latents, (B, image tokens, 64), in the model's dtype.
            encoder_hidden_states: text, (B, text tokens, text width), in the model's dtype.
            timestep: sigma in [0, 1], (B,), fp32.
            img_ids, txt_ids: places of the tokens, (tokens, 3); not needed when image_rotary_emb is given.
            attention_mask: None, or boolean (B, text + image tokens); False is not attended.
            image_rotary_emb: cosines and sines of all tokens, (text + image tokens, head width) each.
        """
        num_double, num_single = len(self.transformer_blocks), len(self.single_transformer_blocks)
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        rows = self.modulation(timestep, image.dtype)
        lengths = [3 * num_single, 6 * num_double, 6 * num_double, 2]
        single_rows, image_rows, text_rows, final_rows = rows.split(lengths, dim=1)
        if image_rotary_emb is None:
            assert img_ids is not None and txt_ids is not None
            image_rotary_emb = self.pos_embed(torch.cat([txt_ids, img_ids]))
        shared = {
            "image_rotary_emb": image_rotary_emb,
            "attention_mask": attention_mask,
            "joint_attention_kwargs": joint_attention_kwargs,
        }
        for i, block in enumerate(self.transformer_blocks):
            modulation = torch.cat([image_rows[:, 6 * i : 6 * i + 6], text_rows[:, 6 * i : 6 * i + 6]], dim=1)
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=modulation, **shared)
        joint = torch.cat([text, image], dim=1)
        for i, block in enumerate(self.single_transformer_blocks):
            joint = block(hidden_states=joint, temb=single_rows[:, 3 * i : 3 * i + 3], **shared)
        velocity = self.proj_out(self.norm_out(joint[:, text.shape[1] :], final_rows))
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)
