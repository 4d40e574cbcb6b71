"""Chroma: T5 text encoder, Flux's VAE, and a transformer modulated by a frozen approximator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...config.model import ModelConfig
from ...config.training import TrainingConfig
from ...config.validation import ValidationConfig
from ...errors import Problem
from ...host import collect
from ..family import Convert
from ..flux_lineage import FluxLikeFamily, can_be_planned, input_form, rope
from ..latent_packing import batch_text, pack, unpack
from ..loading.fingerprint import identity_of
from ..loading.locate import Part, describe, find_part, is_local, is_offline, load_shipped_config
from ..loading.weights import Weights
from ..lora_targets import CHROMA
from ..text.tokenizer import check_t5_tokenizer
from ..token_routing import Route
from .checkpoint_keys import TRANSFORMER, transformer_config


class ChromaFamily(FluxLikeFamily):
    """Chroma's implementation of models.family.Family."""

    name = "chroma"
    transformer_kind = TRANSFORMER
    full_precision: tuple[str, ...] = (
        "distilled_guidance_layer*",
        "x_embedder",
        "context_embedder",
        "*norm*",
        "proj_out",
    )
    frozen = CHROMA.frozen
    whole = CHROMA.whole
    targets = CHROMA.targets

    def problems(self, model: ModelConfig, needs_weights: bool = True) -> list[Problem]:
        problems = self.part_problems(model, needs_weights)
        if needs_weights or model.text_encoder_file or not can_be_planned(model.repo):
            collect(problems, self._check_tokenizer, model)
        return problems

    def labels(self, model: ModelConfig) -> Mapping[str, str]:
        return {"ss_base_model_version": "chroma", "modelspec.architecture": "chroma/lora"}

    def resolve_training(self, model: ModelConfig, settings: TrainingConfig) -> TrainingConfig:
        return settings.with_density("chroma")

    def resolve_sampling(self, model: ModelConfig, settings: ValidationConfig) -> ValidationConfig:
        if settings.sampling == "as set":
            return settings
        # As in ComfyUI's template for Chroma. The flash flavor needs no CFG.
        cfg = 1.0 if model.flavour == "flash" else 3.5
        return replace(settings, steps=26, cfg=cfg, scheduler="beta", shift=1.0)

    def warning(self, model: ModelConfig, settings: ValidationConfig) -> str:
        return ""

    def takes_references(self, model: ModelConfig) -> bool:
        return False

    def text_rows(self, model: ModelConfig, num_tokens: int) -> int:
        return num_tokens

    def identity(self, model: ModelConfig, part: str) -> str:
        if part == "text_encoder":
            from ..text.t5 import text_identity

            return text_identity(model)
        if part == "codec":
            from ..codec import codec_identity

            return codec_identity(model)
        return identity_of(find_part(model, part).files)

    def text_encoder_config(self, model: ModelConfig) -> dict[str, Any]:
        from ..text.t5 import t5_config

        return t5_config(model)

    def load_text_encoder(self, model: ModelConfig, device: torch.device, convert: Convert | None = None) -> Any:
        from ..text.t5 import load_t5

        return load_t5(model, device, convert)

    def empty_text_encoder(self, model: ModelConfig, convert: Convert | None = None) -> nn.Module:
        from ..text.t5 import empty_t5

        return empty_t5(model, convert)

    def describe_transformer(self, model: ModelConfig) -> Part:
        return describe(model, "transformer", load_shipped_config("chroma_transformer"))

    def build_on_meta(self, part: Part, weights: Weights) -> Any:
        from .transformer import ChromaTransformer

        with torch.device("meta"):
            transformer = ChromaTransformer.from_config(transformer_config(part, weights))
        transformer.restore_buffers_()
        return transformer

    def load_transformer(self, model: ModelConfig, convert: Convert | None = None) -> nn.Module:
        return self.read_transformer(model, convert)[0]

    def prepare_(self, transformer: nn.Module, model: ModelConfig) -> None:
        pass

    def drawing(self, transformer: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def predict(
        self,
        transformer: Any,
        x_sigma: Tensor,
        sigma: Tensor,
        text: Sequence[Tensor],
        reference: Tensor | None = None,
        route: Route | None = None,
    ) -> Tensor:
        assert reference is None, "Chroma takes no references"
        weight = transformer.distilled_guidance_layer.in_proj.weight  # never adapted, never quantized
        device, dtype = input_form(transformer, weight)
        height, width = x_sigma.shape[-2:]
        tokens, mask = batch_text(text, num_image_tokens=height * width // 4)
        velocity = transformer(
            hidden_states=pack(x_sigma.to(device, dtype)),
            encoder_hidden_states=tokens.to(device, dtype),
            timestep=sigma.to(device, torch.float32),
            attention_mask=None if mask is None else mask.to(device),
            image_rotary_emb=rope(transformer, tokens.shape[1], height, width, device),
            return_dict=False,
            route=route,
        )[0]
        return unpack(velocity.to(torch.promote_types(velocity.dtype, torch.float32)), height, width)

    def _check_tokenizer(self, model: ModelConfig) -> None:
        if is_local(model.repo) or not model.repo or is_offline():
            check_t5_tokenizer(model)
