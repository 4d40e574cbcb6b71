"""Images of a published model, with a LoRA at any strength: what the scores and the first image are made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from chroma_trainer.trainer_core.adapters.files.load import apply_lora_
from chroma_trainer.trainer_core.adapters.inject import set_strength_
from diffusers import AutoencoderKL
from tokenizers import Tokenizer

from .autoencoder import decode
from .base import draw, load


class Sampler:
    """A model in fp32.

    Args:
        model: Its folder, as publish.py writes it.
        lora: A LoRA; None: the base alone.
    """

    def __init__(self, model: Path, lora: Path | None = None):
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer" / "tokenizer.json"))
        self.vae = AutoencoderKL.from_pretrained(model, subfolder="vae").float().requires_grad_(False)
        self.nano = load(model, self.tokenizer)
        self.lora = lora
        if lora:
            apply_lora_(self.nano.transformer, lora, 1.0)

    def images(self, prompts: Sequence[str], strength: float = 1.0, seed: int = 0, cfg: float = 3.0) -> np.ndarray:
        """(B, 64, 64, 3) uint8, of one batch of noise. strength: of the LoRA."""
        if self.lora:
            set_strength_(self.nano.transformer, strength)
        return decode(self.vae, draw(self.nano, self.tokenizer, prompts, cfg=cfg, seed=seed))
