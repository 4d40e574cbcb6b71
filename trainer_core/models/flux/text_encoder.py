"""Flux's text: what T5 says of each token, and what CLIP-L says of the whole prompt.

Both travel as one tensor, so that no cache ever holds one without the other: T5's rows, and below them one row that begins
with CLIP's pooled vector and is zero behind it (768 of 4096 in the released models).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...config.model import ModelConfig
from ..family import Convert
from ..loading.fingerprint import identity_of
from ..loading.locate import find_part
from ..text.clip import ClipPooler, clip_config, empty_clip, find_clip, load_clip
from ..text.t5 import T5TextEncoder, empty_t5, load_t5
from ..text.tokenizer import find_clip_tokenizer, find_t5_tokenizer


class FluxTextEncoder:
    """One prompt at a time, see T5TextEncoder. The members are those of contract.TextEncoder."""

    def __init__(self, t5: T5TextEncoder, clip: ClipPooler):
        self.t5, self.clip = t5, clip

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """One (rows, width) tensor a prompt, see join, on the CPU, in the encoders' dtype."""
        return [join(*both) for both in zip(self.t5.encode(prompts), self.clip.encode(prompts), strict=True)]


class EmptyFluxText(nn.Module):
    """Both encoders on the meta device, as load_flux_text would load them. CLIP looks at a prompt when T5 is done."""

    def __init__(self, model: ModelConfig, convert: Convert | None = None):
        super().__init__()
        self.t5, self.clip = empty_t5(model, convert), empty_clip(model)
        self.clip_tokens: int = clip_config(model)["max_position_embeddings"]

    def forward(self, ids: Tensor) -> Any:
        """(1, tokens) -> what T5 says of them."""
        tokens = self.t5(ids)
        self.clip(ids[:, : self.clip_tokens])
        return tokens


def join(tokens: Tensor, pooled: Tensor) -> Tensor:
    """(tokens, width) and (pooled width,) -> (tokens + 1, width)."""
    assert len(pooled) <= tokens.shape[1], "the pooled vector does not fit in a row"
    row = tokens.new_zeros(1, tokens.shape[1])
    row[0, : len(pooled)] = pooled
    return torch.cat([tokens, row])


def part(text: Sequence[Tensor], pooled_width: int) -> tuple[list[Tensor], Tensor]:
    """What join put together: each prompt's tokens, and all pooled vectors, (B, pooled width)."""
    return [rows[:-1] for rows in text], torch.stack([rows[-1, :pooled_width] for rows in text])


def load_flux_text(model: ModelConfig, device: torch.device, convert: Convert | None = None) -> FluxTextEncoder:
    """Both encoders. CLIP-L is 0.25 GB: it is not quantised.

    Raises:
        UserError: files are missing or do not fit.
    """
    return FluxTextEncoder(load_t5(model, device, convert, **_rules(model)), load_clip(model, device))


def flux_text_identity(model: ModelConfig) -> str:
    """Digest of what decides an embedding: both encoders, their tokenizers, precision and the rule of length."""
    files = [
        *find_part(model, "text_encoder").files, find_t5_tokenizer(model),
        *find_clip(model).files, *find_clip_tokenizer(model),
    ]  # fmt: skip
    rules = _rules(model)
    length = f"{'k' if rules['num_pads'] == 0 else 'all'} of {rules['max_tokens']} tokens, unmasked"
    return identity_of(files, f"transformers' t5 and clip {model.dtype}, {length}")


def _rules(model: ModelConfig) -> dict[str, Any]:
    """Pads attend in T5. In the transformer as well, so that all rows are kept; unless the model was trained with a mask,
    where leaving them out equals it."""
    assert model.flux is not None
    num_pads = 0 if model.flux.is_masked else model.flux.max_tokens
    return {"max_tokens": model.flux.max_tokens, "num_pads": num_pads, "is_filled": True}
