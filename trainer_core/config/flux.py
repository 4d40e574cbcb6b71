"""Variants ("flavours") of Flux.1: the repository of each, and its settings for training and sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class FluxFlavour:
    """A released Flux.1 model.

    Args:
        repo: Hugging Face repository in diffusers format.
        max_tokens: length of the T5 text, in tokens. Flux attends to padding, so the text always has this many rows
            (unless is_masked).
        guidance: value of the guidance embedding in training. 1 keeps the distillation: the model still needs no CFG.
        drawn_guidance: value of the guidance embedding in sampling. Models without the embedding ignore both values.
        cfg: CFG scale in sampling.
        steps: steps in sampling.
        shift: sigma shift in sampling, as in flow/sigmas.py. ComfyUI uses e^1.15 for Flux, and none for schnell.
        is_masked: padding is masked in attention.
        is_fast: trained at schnell's own few sigmas, unless another density is chosen.
        architecture: modelspec.architecture in the header of a LoRA file.
        base_version: ss_base_model_version in the header of a LoRA file.
        takes_references: edits reference images.
    """

    repo: str
    max_tokens: int = 512
    guidance: float = 1.0
    drawn_guidance: float = 3.5
    cfg: float = 1.0
    steps: int = 28
    shift: float = math.exp(1.15)  # 3.158
    is_masked: bool = False
    is_fast: bool = False
    architecture: str = "flux-1-dev/lora"
    base_version: str = "flux1"
    takes_references: bool = False

    @property
    def has_guidance(self) -> bool:
        """Whether the transformer has a guidance embedding: models derived from dev do, those from schnell do not."""
        return self.architecture == "flux-1-dev/lora"


FLAVOURS = {
    "krea": FluxFlavour("black-forest-labs/FLUX.1-Krea-dev", drawn_guidance=4.5),
    "dev": FluxFlavour("black-forest-labs/FLUX.1-dev"),
    "schnell": FluxFlavour(
        "black-forest-labs/FLUX.1-schnell", max_tokens=256, steps=4, shift=1.0, is_fast=True,
        architecture="flux-1-schnell/lora",
    ),
    "kontext": FluxFlavour("black-forest-labs/FLUX.1-Kontext-dev", drawn_guidance=2.5, takes_references=True),
    "fluxbooru": FluxFlavour("terminusresearch/fluxbooru-v0.3", guidance=3.5, cfg=6.0),
    "libreflux": FluxFlavour(
        "jimmycarter/LibreFlux-SimpleTuner", cfg=6.0, shift=1.0, is_masked=True, architecture="flux-1-schnell/lora"
    ),
}  # fmt: skip


UNMODIFIED, ZERO = "unmodified", "zero"  # t5_padding
ASSISTED = "schnell"  # the flavour that is trained with an assistant
ASSISTANT_REPO = "ostris/FLUX.1-schnell-training-adapter"
ASSISTANT_FILE = "pytorch_lora_weights.safetensors"  # in that repository


def is_assistant(name: str) -> bool:
    """Return whether a LoRA's file name is one of schnell's training adapter."""
    text = name.lower()
    return ASSISTED in text and any(word in text for word in ("training", "assistant"))


# Part -> its folder in a diffusers repository, for parts whose folder has another name.
FOLDERS = {
    "text_encoder": "text_encoder_2",
    "tokenizer": "tokenizer_2",
    "clip": "text_encoder",
    "clip_tokenizer": "tokenizer",
}


@dataclass(frozen=True)
class FluxOptions:
    """Settings that only Flux has: the file of its second text encoder, and overrides of its flavour's settings.

    Args:
        clip_file: single .safetensors file of CLIP-L (absolute path), "" to use the repo.
        max_tokens: see FluxFlavour.
        guidance: see FluxFlavour.
        drawn_guidance: see FluxFlavour.
        is_masked: see FluxFlavour.
        is_fast: see FluxFlavour.
        assistant_file: LoRA that is active in training but not in sampling; "" for none.
        t5_padding: "unmodified": T5's embeddings of padding; "zero": zeros in their place.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("clip_file", "assistant_file")
    LATER: ClassVar[tuple[tuple[str, ...], ...]] = (("t5_padding",),)
    KEY: ClassVar[tuple[str, ...]] = (
        "FluxOptions", "clip_file", "max_tokens", "guidance", "drawn_guidance", "is_masked", "is_fast",
        "assistant_file", "t5_padding",
    )  # fmt: skip

    clip_file: str = ""
    max_tokens: int = 512
    guidance: float = 1.0
    drawn_guidance: float = 3.5
    is_masked: bool = False
    is_fast: bool = False
    assistant_file: str = ""
    t5_padding: str = UNMODIFIED
