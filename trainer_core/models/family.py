"""The interface of a model family.

Adding a family takes one file and one line in the registry; tests/contracts/ runs over every registered family.
A family holds no state: every method receives what it needs as arguments.
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
    """Encodes prompts. The family decides how a prompt is truncated and padded."""

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return one (rows, width) tensor per prompt, on the CPU, in the encoder's dtype.

        Only `predict` interprets the rows: they are token embeddings, plus any other conditioning that the transformer
        takes from the prompt.
        """
        ...


class ImageCodec(Protocol):
    """Converts between images and normalized latents."""

    factor: int  # pixels per latent cell along each edge
    channels: int

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, H, W) in [-1, 1] to (B, channels, H / factor, W / factor), fp32, on the CPU.

        The result is the mean of the latent distribution, shifted and scaled.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to (B, 3, H, W) in [-1, 1], fp32, on the CPU."""
        ...

    def move_(self, device: torch.device) -> None:
        """Move the codec to a device."""
        ...

    def economise_(self, tiling: bool, slicing: bool) -> None:
        """Use less memory: work in tiles, or on one image at a time. The last bits of the result may change."""
        ...


class Family(Protocol):
    """Everything the trainer needs from a model family."""

    name: str
    pixel_step: int  # image edges are multiples of this: latent_factor x the edge of a token in latent cells
    latent_channels: int
    latent_factor: (
        int  # pixels per latent cell along each edge; 1: the model works on pixels in [-1, 1], see load_codec
    )
    full_precision: tuple[str, ...]  # fnmatch patterns of modules that are never quantized
    frozen: tuple[str, ...]  # fnmatch patterns of modules that never get a LoRA
    targets: Mapping[str, tuple[str, ...]]  # preset name -> module patterns, see adapters/targets.py
    whole: Mapping[str, tuple[str, ...]]  # further presets, of kind full alone

    def problems(self, model: ModelConfig, needs_weights: bool = True) -> list[Problem]:
        """Return the problems with the model's files (missing parts, wrong files, no network). Loads no weights.

        Args:
            model: The model.
            needs_weights: False for a plan: the files of a released model need not be on this machine.
        """
        ...

    def labels(self, model: ModelConfig) -> Mapping[str, str]:
        """Return the LoRA metadata that describes the base model.

        The keys are ss_base_model_version and modelspec.architecture (such as "chroma/lora").
        """
        ...

    def resolve_training(self, model: ModelConfig, settings: TrainingConfig) -> TrainingConfig:
        """Return the training settings for this model.

        sigma_density auto becomes the family's usual density. A flavor may replace the density.
        """
        ...

    def resolve_sampling(self, model: ModelConfig, settings: ValidationConfig) -> ValidationConfig:
        """Return the sampling settings, with the model's own steps, cfg, scheduler and shift where none are set."""
        ...

    def warning(self, model: ModelConfig, settings: ValidationConfig) -> str:
        """Return a warning about sampling this model with these settings, or ''."""
        ...

    def takes_references(self, model: ModelConfig) -> bool:
        """Return whether the model generates images from reference images. Each training image then needs one."""
        ...

    def text_rows(self, model: ModelConfig, num_tokens: int) -> int:
        """Return the number of rows that `encode` returns for a prompt of num_tokens tokens (without padding)."""
        ...

    def identity(self, model: ModelConfig, part: str) -> str:
        """Return a hex digest of a part's weights and rules, for use as a cache key.

        The digest is computed from the files' contents, not from their paths (models/loading/fingerprint.py).

        Args:
            model: The model.
            part: "transformer", "text_encoder" (includes the tokenizer and the length rule) or "codec" (includes the
                normalization).
        """
        ...

    def text_encoder_config(self, model: ModelConfig) -> dict[str, Any]:
        """Return what determines the text encoder's shapes, as JSON values.

        Reads file headers and config.json. The encoder's library is not imported.
        """
        ...

    def load_text_encoder(
        self, model: ModelConfig, device: torch.device, convert: Convert | None = None
    ) -> TextEncoder:
        """Load the text encoder. For `convert`, see load_transformer."""
        ...

    def empty_text_encoder(self, model: ModelConfig, convert: Convert | None = None) -> nn.Module:
        """Return the text encoder's modules on the meta device. Reads file headers, no weights.

        The module takes ids, (1, tokens), and returns a result whose first item is (1, tokens, width). Building it
        imports the encoder's library, which takes seconds.
        """
        ...

    def load_codec(self, model: ModelConfig, device: torch.device) -> ImageCodec:
        """Load the VAE onto a device. A model that works on pixels has a codec that returns the pixels."""
        ...

    def codec_config(self, model: ModelConfig) -> dict[str, Any]:
        """Return what determines the VAE's shapes, as JSON values; {} without one. Reads headers, imports no library."""
        ...

    def empty_codec(self, model: ModelConfig) -> nn.Module | None:
        """Return the VAE on the meta device, as load_codec would load it. None: the model works on pixels."""
        ...

    def empty_transformer(self, model: ModelConfig) -> nn.Module:
        """Return the transformer on the meta device, with the buffers that no file holds. Reads file headers only."""
        ...

    def shared_transformer(self, model: ModelConfig) -> nn.Module:
        """Return what empty_transformer returns, built once for all callers as long as the files stay the same.

        It must not be changed. load_transformer loads into it, so it must not be kept either.
        """
        ...

    def load_transformer(self, model: ModelConfig, convert: Convert | None = None) -> nn.Module:
        """Load the transformer on the CPU, in the model's dtype, frozen, in eval mode.

        Args:
            model: The model.
            convert: Called with the full name and the loaded layer of each Linear; returns its replacement, such as a
                quantized layer. Layers are then read, converted and freed one at a time, and the remaining tensors are
                copied instead of memory-mapped.
        """
        ...

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """Return the repeated blocks in order. Each is checkpointed, compiled and offloaded separately."""
        ...

    def prepare_(self, transformer: nn.Module, model: ModelConfig) -> None:
        """Modify a loaded (and quantized) transformer before the LoRA is injected, such as adding an assistant LoRA."""
        ...

    def drawing(self, transformer: nn.Module) -> AbstractContextManager[None]:
        """Context manager for sampling: uses the sampling guidance and disables training-only parts."""
        ...

    def num_noise_levels(self, transformer: nn.Module) -> int:
        """Return the size of the table of sigmas that ComfyUI samples this model with, see flow/sigmas.py."""
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
        """Predict the velocity, noise - x0, at x_sigma.

        Args:
            transformer: The model.
            x_sigma: Noisy latents, (B, channels, h, w), in the transformer's dtype or fp32.
            sigma: Noise levels in [0, 1], (B,), fp32.
            text: B tensors (rows, width) from the text encoder. Lengths may differ; the family decides how they are
                batched and masked.
            reference: Clean reference latents, (B, channels, any h, any w). Only for models that take references.
            route: Which image tokens skip which blocks during training. None: no token skips a block. Reference tokens
                never skip one.
        Returns:
            The velocity, (B, channels, h, w), fp32.
        """
        ...

    def loss_weight(self, transformer: nn.Module, sigma: Tensor) -> Tensor | None:
        """Return a factor of the training loss at each noise level, (B,), fp32; None where it is 1.

        For models whose velocity is derived from another prediction, and is therefore more exact at some levels.
        """
        ...
