"""Chroma1-Radiance: Chroma's text encoder and blocks on pixels. There is no VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...config.model import ModelConfig
from ...storage.atomic import sha256_text
from ..chroma.family import ChromaFamily
from ..flux_lineage import input_form, rope
from ..latent_packing import batch_text
from ..loading.locate import Part, describe
from ..loading.weights import Layout, Weights
from ..lora_targets import RADIANCE
from ..token_routing import Route
from .checkpoint_keys import SEQUENTIAL, TRANSFORMER, X0, layout_of, transformer_config

LOWEST_SIGMA = 1e-4  # where the velocity that is derived from clean pixels is bounded
# The x0 variant was trained on the error of the clean image divided by sigma + 0.05, not by sigma
# (github.com/lodestone-rock).
X0_SIGMA = 0.05


class RadianceFamily(ChromaFamily):
    """Radiance's implementation of models.family.Family. What it shares with Chroma is there."""

    name = "radiance"
    pixel_step, latent_channels, latent_factor = 16, 3, 1
    transformer_kind = TRANSFORMER
    parts = ("transformer", "text_encoder")
    ignored_keys = (X0, SEQUENTIAL)
    full_precision: tuple[str, ...] = (
        "distilled_guidance_layer*",
        "img_in_patch",
        "context_embedder",
        "*norm*",
        "nerf_*",
    )
    frozen = RADIANCE.frozen
    whole = RADIANCE.whole
    targets = RADIANCE.targets

    def labels(self, model: ModelConfig) -> Mapping[str, str]:
        return {"ss_base_model_version": "chroma_radiance", "modelspec.architecture": "chroma-radiance/lora"}

    def identity(self, model: ModelConfig, part: str) -> str:
        return sha256_text("pixels in 8 bits") if part == "codec" else super().identity(model, part)

    def load_codec(self, model: ModelConfig, device: torch.device) -> PixelCodec:
        return PixelCodec()

    def codec_config(self, model: ModelConfig) -> dict[str, Any]:
        return {}

    def empty_codec(self, model: ModelConfig) -> None:
        return None

    def describe_transformer(self, model: ModelConfig) -> Part:
        return describe(model, "transformer", {})

    def build_on_meta(self, part: Part, weights: Weights) -> Any:
        from .transformer import RadianceTransformer

        with torch.device("meta"):
            transformer = RadianceTransformer.from_config(transformer_config(weights))
        transformer.restore_buffers_()
        return transformer

    def dtype_of(self, parameter: str, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if parameter.startswith("nerf_image_embedder.") else dtype

    def layout_of(self, transformer: Any, weights: Weights) -> Layout:
        return layout_of(transformer.inner_dim)

    def predict(
        self,
        transformer: Any,
        x_sigma: Tensor,
        sigma: Tensor,
        text: Sequence[Tensor],
        reference: Tensor | None = None,
        route: Route | None = None,
    ) -> Tensor:
        assert reference is None, "Radiance takes no references"
        weight = transformer.distilled_guidance_layer.in_proj.weight  # never adapted, never quantized
        height, width = x_sigma.shape[-2:]
        patch, (device, dtype) = transformer.patch_size, input_form(transformer, weight)
        tokens, mask = batch_text(text, num_image_tokens=height * width // patch**2)
        x, sigma = x_sigma.to(device), sigma.to(device, torch.float32)
        output = transformer(
            x, tokens.to(device, dtype), sigma,
            positions(transformer, tokens.shape[1], height, width, device),
            None if mask is None else mask.to(device), route,
        )  # fmt: skip
        output = output.to(torch.promote_types(output.dtype, torch.float32)).contiguous()
        if not transformer.predicts_x0:
            return output
        return (x.to(output.dtype) - output) / sigma.clamp_min(LOWEST_SIGMA)[:, None, None, None]

    def loss_weight(self, transformer: Any, sigma: Tensor) -> Tensor | None:
        """See X0_SIGMA. Without it the loss would grow without bound towards sigma 0."""
        if not transformer.predicts_x0:
            return None
        lowest = sigma.float().clamp_min(LOWEST_SIGMA)
        return (lowest / (lowest + X0_SIGMA)).square()


def positions(transformer: Any, num_text: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of all tokens, text first. Text is at (0, 0, 0), or at (i, 0, 0) in newer files."""
    patch = transformer.patch_size
    if not transformer.has_text_positions:
        return rope(transformer, num_text, height, width, device, patch=patch)
    ids = torch.zeros(num_text, 3)
    ids[:, 0] = torch.arange(num_text)
    of_text, of_image = transformer.pos_embed(ids), rope(transformer, 0, height, width, device, patch=patch)
    cosines, sines = (torch.cat([a.to(device), b]) for a, b in zip(of_text, of_image, strict=True))
    return cosines, sines


class PixelCodec:
    """Pixels in place of latents. See models.family.ImageCodec."""

    factor, channels = 1, 3

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels.detach().float().cpu()

    def decode(self, latents: Tensor) -> Tensor:
        return latents.detach().float().cpu().clamp(-1, 1)

    def move_(self, device: torch.device) -> None:
        pass

    def economise_(self, tiling: bool, slicing: bool) -> None:
        pass
