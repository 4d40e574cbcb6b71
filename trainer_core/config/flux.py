"""The flavours of Flux.1, as data: where each comes from, and what it wants in training and in drawing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class FluxFlavour:
    """One released member of the family.

    Args:
        repo: hub id of the diffusers folder.
        max_tokens: of T5's text. Pads are attended, so that this many rows always are there (unless is_masked).
        guidance: told to the model in training. 1 keeps the distillation; the model needs no CFG, as before.
        drawn_guidance: told to it while pictures are drawn. Neither matters to a model without a guidance embedding.
        cfg, steps, shift: of drawing; shift as flow/sigmas.py has it. ComfyUI's Flux has e^1.15, schnell none.
        is_masked: pads are not attended.
        takes_references: makes pictures out of others.
        is_fast: trained at schnell's own few noise levels, unless another density is chosen.
        architecture, base_version: as a LoRA's header says them.
    """

    repo: str
    max_tokens: int = 512
    guidance: float = 1.0
    drawn_guidance: float = 3.5
    cfg: float = 1.0
    steps: int = 28
    shift: float = 3.158
    is_masked: bool = False
    is_fast: bool = False
    architecture: str = "flux-1-dev/lora"
    base_version: str = "flux1"
    takes_references: bool = False

    @property
    def has_guidance(self) -> bool:
        """Whether the transformer has an embedding of guidance: dev's descendants have, schnell's have not."""
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


# Part -> its folder in a diffusers repository, where that is not the part's own name.
FOLDERS = {
    "text_encoder": "text_encoder_2",
    "tokenizer": "tokenizer_2",
    "clip": "text_encoder",
    "clip_tokenizer": "tokenizer",
}


@dataclass(frozen=True)
class FluxOptions:
    """What only a Flux has: a second text encoder's file, and its flavour's rules, which may be set otherwise.

    Args:
        clip_file: single .safetensors file of CLIP-L (absolute path), "" for the repo's own.
        assistant_file: a LoRA that acts while the model trains and not while it draws; "" for none.
        max_tokens, guidance, drawn_guidance, is_masked, is_fast: see FluxFlavour.
    """

    PATHS: ClassVar = ("clip_file", "assistant_file")

    clip_file: str = ""
    max_tokens: int = 512
    guidance: float = 1.0
    drawn_guidance: float = 3.5
    is_masked: bool = False
    is_fast: bool = False
    assistant_file: str = ""
