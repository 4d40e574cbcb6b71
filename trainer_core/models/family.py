"""What a model family brings. One file and one registry line add a family; tests/contracts/ runs over all of them.

A family holds no state: every method takes what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config.model import ModelConfig
from ..config.training import TrainingConfig
from ..config.validation import ValidationConfig
from ..errors import Problem
from .token_routing import Route

Convert = Callable[[str, nn.Linear], nn.Module]


class TextEncoder(Protocol):
    """Prompts -> embeddings, with the family's own rule of length."""

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """One (rows, width) tensor a prompt, on the CPU, in the encoder's dtype. What rows are is known to `predict`: tokens,
        and whatever else the transformer is told of a prompt."""
        ...


class ImageCodec(Protocol):
    """Pictures <-> normalised latents."""

    factor: int  # pixels a latent cell, along an edge
    channels: int

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, channels, H / factor, W / factor), the mean, shifted and scaled; fp32, CPU."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """The way back: (B, 3, H, W) in [-1, 1], fp32, CPU."""
        ...

    def move_(self, device: torch.device) -> None:
        """Where it computes from now on."""
        ...

    def economise_(self, tiling: bool, slicing: bool) -> None:
        """Take less memory: work in tiles, or on one picture after the other. Last bits may change."""
        ...


class Family(Protocol):
    """Everything the engine asks of a model family."""

    name: str
    pixel_step: int  # picture edges are multiples of this (VAE factor x patch)
    full_precision: tuple[str, ...]  # fnmatch patterns of modules that are never quantised
    frozen: tuple[str, ...]  # fnmatch patterns of modules that a LoRA never touches
    targets: Mapping[str, tuple[str, ...]]  # preset name -> module patterns, see adapters/targets.py

    def problems(self, model: ModelConfig) -> list[Problem]:
        """What is wrong with the model's files, without loading weights: missing parts, wrong files, no network."""
        ...

    def labels(self, model: ModelConfig) -> Mapping[str, str]:
        """What a LoRA's header says of its base: ss_base_model_version, and modelspec.architecture, such as "chroma/lora"."""
        ...

    def resolve_training(self, model: ModelConfig, settings: TrainingConfig) -> TrainingConfig:
        """The settings as this model is trained with them: a flavour may ask for its own noise levels."""
        ...

    def resolve_sampling(self, model: ModelConfig, settings: ValidationConfig) -> ValidationConfig:
        """The settings as pictures are drawn with them: steps, cfg, scheduler and shift of the model where they are left to it."""
        ...

    def warning(self, model: ModelConfig, settings: ValidationConfig) -> str:
        """What a person should know before pictures are drawn so, mostly nothing: ''."""
        ...

    def takes_references(self, model: ModelConfig) -> bool:
        """Whether it makes pictures out of others: then every picture that is trained has one to start from."""
        ...

    def text_rows(self, model: ModelConfig, num_tokens: int) -> int:
        """Rows of the longest prompt's tensor, whose real tokens are this many."""
        ...

    def identity(self, model: ModelConfig, part: str) -> str:
        """Hex digest that names a part's weights and rules, from samples of its files (not from paths): a cache's key.

        part: "transformer", "text_encoder" (with tokenizer and rule of length) or "codec" (with normalisation).
        """
        ...

    def text_encoder_config(self, model: ModelConfig) -> dict[str, Any]:
        """What decides the shapes of the text encoder, as JSON values: from headers and config.json, no library is imported."""
        ...

    def load_text_encoder(
        self, model: ModelConfig, device: torch.device, convert: Convert | None = None
    ) -> TextEncoder:
        """convert: see load_transformer."""
        ...

    def empty_text_encoder(self, model: ModelConfig, convert: Convert | None = None) -> nn.Module:
        """The encoder's modules as they would be loaded, on the meta device: of (1, tokens) ids, a result whose first is (1, tokens, width).

        Reads headers, no weights. Imports the encoder's library, which takes seconds.
        """
        ...

    def load_codec(self, model: ModelConfig, device: torch.device) -> ImageCodec: ...

    def empty_transformer(self, model: ModelConfig) -> nn.Module:
        """Its modules on the meta device, with every buffer that no file holds; reads headers, no weights."""
        ...

    def load_transformer(self, model: ModelConfig, convert: Convert | None = None) -> nn.Module:
        """On the CPU, in the model's dtype, frozen, in eval mode.

        Args:
            convert: from a Linear's full name and the filled layer, what takes its place, such as a quantised one. Then one layer
                after the other is read, converted and freed, and what stays is not mapped from the files.
        """
        ...

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The repeated blocks, in order: what is checkpointed, compiled and offloaded one by one."""
        ...

    def prepare_(self, transformer: nn.Module, model: ModelConfig) -> None:
        """What is put on a loaded and quantised transformer before a LoRA is, such as an assistant that helps it to train."""
        ...

    def drawing(self, transformer: nn.Module) -> AbstractContextManager[None]:
        """While it lasts `predict` draws pictures: with the guidance of drawing, and without what only helps to train."""
        ...

    def predict(
        self,
        transformer: nn.Module,
        x_sigma: Tensor,
        sigma: Tensor,
        text: Sequence[Tensor],
        reference: Tensor | None = None,
        route: Route | None = None,
    ) -> Tensor:
        """The velocity noise - x0 at x_sigma.

        Args:
            x_sigma: (B, channels, h, w), in the transformer's dtype or fp32.
            sigma: (B,), fp32, in [0, 1].
            text: B tensors (rows, width) of the text encoder, lengths may differ; how they are batched and masked is the family's rule.
            reference: clean latents to start from, (B, channels, any h, any w); only where it takes references.
            route: which of the picture's tokens skip which blocks, for training; None: none does. References go through all.
        Returns:
            (B, channels, h, w), fp32.
        """
        ...
