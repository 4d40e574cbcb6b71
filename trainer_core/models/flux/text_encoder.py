"""Flux's text encoding: T5 embeddings of each token, and CLIP-L's embedding of the whole prompt.

Both are stored in one tensor, so that a cache never holds one without the other: T5's rows, then one row that starts
with CLIP's pooled vector and is zero after it (768 of 4096 in the released models).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...config.flux import ZERO
from ...config.model import ModelConfig
from ..family import Convert
from ..loading.fingerprint import identity_of
from ..loading.locate import find_part
from ..text.clip import ClipPooler, clip_config, empty_clip, find_clip, load_clip
from ..text.t5 import T5TextEncoder, empty_t5, load_t5
from ..text.tokenizer import find_clip_tokenizer, find_t5_tokenizer


class FluxTextEncoder:
    """Encodes one prompt at a time, see T5TextEncoder. Implements models.family.TextEncoder."""

    def __init__(self, t5: T5TextEncoder, clip: ClipPooler):
        self.t5, self.clip = t5, clip

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return one (rows, width) tensor per prompt (see join), on the CPU, in the encoders' dtype."""
        return [join(*both) for both in zip(self.t5.encode(prompts), self.clip.encode(prompts), strict=True)]


class EmptyFluxText(nn.Module):
    """Both encoders on the meta device, as load_flux_text would load them. CLIP runs after T5."""

    def __init__(self, model: ModelConfig, convert: Convert | None = None):
        super().__init__()
        self.t5, self.clip = empty_t5(model, convert), empty_clip(model)
        self.clip_tokens: int = clip_config(model)["max_position_embeddings"]

    def forward(self, ids: Tensor) -> Any:
        """Map ids, (1, tokens), to T5's output, whose first item is (1, tokens, width)."""
        tokens = self.t5(ids)
        self.clip(ids[:, : self.clip_tokens])
        return tokens


def join(tokens: Tensor, pooled: Tensor) -> Tensor:
    """Join (tokens, width) and (pooled width,) to (tokens + 1, width)."""
    assert len(pooled) <= tokens.shape[1], "the pooled vector is longer than a row"
    row = tokens.new_zeros(1, tokens.shape[1])
    row[0, : len(pooled)] = pooled
    return torch.cat([tokens, row])


def part(text: Sequence[Tensor], pooled_width: int) -> tuple[list[Tensor], Tensor]:
    """Undo join: return each prompt's tokens, and all pooled vectors, (B, pooled width)."""
    return [rows[:-1] for rows in text], torch.stack([rows[-1, :pooled_width] for rows in text])


def load_flux_text(model: ModelConfig, device: torch.device, convert: Convert | None = None) -> FluxTextEncoder:
    """Load both encoders. CLIP-L has only 0.25 GB, so it is not quantized.

    Raises:
        UserError: Files are missing or don't match.
    """
    return FluxTextEncoder(load_t5(model, device, convert, **_length_rules(model)), load_clip(model, device))


def flux_text_identity(model: ModelConfig) -> str:
    """Return a digest of what determines an embedding: both encoders, their tokenizers, dtype and the length rule."""
    files = [
        *find_part(model, "text_encoder").files, find_t5_tokenizer(model),
        *find_clip(model).files, *find_clip_tokenizer(model),
    ]  # fmt: skip
    rules = _length_rules(model)
    length = f"{'k' if rules['num_pads'] == 0 else 'all'} of {rules['max_tokens']} tokens, unmasked"
    length += ", zeroed" if "is_zeroed" in rules else ""
    return identity_of(files, f"transformers' t5 and clip {model.dtype}, {length}")


def _length_rules(model: ModelConfig) -> dict[str, Any]:
    """Return T5TextEncoder's length rules.

    T5 attends to pad tokens. So does the transformer, which is why all rows are stored. If the model was trained with a
    mask, the pad rows are left out, which is equivalent.
    """
    assert model.flux is not None
    num_pads = 0 if model.flux.is_masked else model.flux.max_tokens
    rules = {"max_tokens": model.flux.max_tokens, "num_pads": num_pads, "is_filled": True}
    return {**rules, "is_zeroed": True} if model.flux.t5_padding == ZERO and num_pads else rules
