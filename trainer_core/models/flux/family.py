"""Flux.1: T5 and CLIP-L text encoders, Flux's VAE, and a transformer with modulation layers in every block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config.flux import FLAVOURS, FluxFlavour
from ...config.model import ModelConfig
from ...config.training import TrainingConfig
from ...config.validation import ValidationConfig
from ...devices import DTYPES
from ...errors import Problem, UserError
from ...flow.sigmas import NUM_LEVELS, NUM_LEVELS_FLUX
from ...host import collect
from ..family import Convert
from ..flux_lineage import FluxLikeFamily, can_be_planned, check_hub, input_form, is_original, rope
from ..latent_packing import batch_text, pack, unpack
from ..loading.fingerprint import content_digest, identity_of
from ..loading.header_check import part_fault
from ..loading.locate import Part, describe, find_part, is_local, is_offline, load_shipped_config
from ..loading.weights import Weights
from ..lora_targets import FLUX
from ..text.clip import CLIP, find_clip
from ..text.tokenizer import check_t5_tokenizer, find_clip_tokenizer
from ..token_routing import Route
from .checkpoint_keys import TRANSFORMER, flux_config
from .text_encoder import part as part_text

LATENT_CHANNELS = 64  # per packed token


class FluxFamily(FluxLikeFamily):
    """Flux's implementation of models.family.Family. Model configs of this family have `flux` options."""

    name = "flux"
    transformer_kind = TRANSFORMER
    # 27 % of the weights are modulations inside the blocks, so those are quantized as well.
    full_precision: tuple[str, ...] = ("time_text_embed*", "x_embedder", "context_embedder", "norm_out*", "proj_out")
    frozen = FLUX.frozen
    whole = FLUX.whole
    targets = FLUX.targets

    def problems(self, model: ModelConfig, needs_weights: bool = True) -> list[Problem]:
        problems = self.part_problems(model, needs_weights)
        collect(problems, self._check_clip, model, needs_weights)
        if not problems and _assistant(model) and (is_local(model.repo) or model.transformer_file):
            collect(problems, self._check_assistant, model)
        has_own_file = bool(model.text_encoder_file or (model.flux and model.flux.clip_file))
        needs_tokenizers = needs_weights or has_own_file or not can_be_planned(model.repo)
        if needs_tokenizers and (is_local(model.repo) or not model.repo or is_offline()):
            collect(problems, check_t5_tokenizer, model)
            collect(problems, find_clip_tokenizer, model)
        return problems

    def labels(self, model: ModelConfig) -> Mapping[str, str]:
        flavour = _flavour(model)
        return {"ss_base_model_version": flavour.base_version, "modelspec.architecture": flavour.architecture}

    def resolve_training(self, model: ModelConfig, settings: TrainingConfig) -> TrainingConfig:
        assert model.flux is not None
        if model.flux.is_fast:
            return replace(settings, sigma_density="schnell", shift=1.0)
        return settings.with_density("logit-normal")

    def resolve_sampling(self, model: ModelConfig, settings: ValidationConfig) -> ValidationConfig:
        if settings.sampling == "as set":
            return settings
        flavour = _flavour(model)
        return replace(settings, steps=flavour.steps, cfg=flavour.cfg, scheduler="simple", shift=flavour.shift)

    def warning(self, model: ModelConfig, settings: ValidationConfig) -> str:
        if settings.cfg == 1 or _flavour(model).cfg > 1:
            return ""
        return (
            f"cfg {settings.cfg:g} oversaturates images of {model.flavour}, which needs no CFG; "
            "set sampling to by model, or cfg to 1"
        )

    def takes_references(self, model: ModelConfig) -> bool:
        return model.takes_references

    def text_rows(self, model: ModelConfig, num_tokens: int) -> int:
        assert model.flux is not None
        return 1 + (num_tokens if model.flux.is_masked else model.flux.max_tokens)

    def identity(self, model: ModelConfig, part: str) -> str:
        if part == "text_encoder":
            from .text_encoder import flux_text_identity

            return flux_text_identity(model)
        if part == "codec":
            from ..codec import codec_identity

            return codec_identity(model)
        files = find_part(model, part).files
        # The trained model includes its assistant.
        return identity_of(files, f"with {content_digest(file)}") if (file := _assistant(model)) else identity_of(files)

    def text_encoder_config(self, model: ModelConfig) -> dict[str, Any]:
        from ..text.clip import clip_config
        from ..text.t5 import t5_config

        return {"t5": t5_config(model), "clip": clip_config(model)}

    def load_text_encoder(self, model: ModelConfig, device: torch.device, convert: Convert | None = None) -> Any:
        from .text_encoder import load_flux_text

        return load_flux_text(model, device, convert)

    def empty_text_encoder(self, model: ModelConfig, convert: Convert | None = None) -> nn.Module:
        from .text_encoder import EmptyFluxText

        return EmptyFluxText(model, convert)

    def describe_transformer(self, model: ModelConfig) -> Part:
        has_guidance = _flavour(model).has_guidance
        shipped = {**load_shipped_config("flux_transformer"), "guidance_embeds": has_guidance}
        return describe(model, "transformer", shipped)

    def shared_transformer(self, model: ModelConfig) -> nn.Module:
        return self._set_guidance(super().shared_transformer(model), model)

    def empty_transformer(self, model: ModelConfig) -> nn.Module:
        return self._set_guidance(super().empty_transformer(model), model)

    def build_on_meta(self, part: Part, weights: Weights) -> Any:
        from .transformer import FluxTransformer

        with torch.device("meta"):
            return FluxTransformer.from_config(flux_config(part, weights))

    def load_transformer(self, model: ModelConfig, convert: Convert | None = None) -> nn.Module:
        transformer, weights = self.read_transformer(model, convert)
        if is_original(weights):
            _swap_halves_(transformer.norm_out.linear)
        return self._set_guidance(transformer, model)

    def prepare_(self, transformer: Any, model: ModelConfig) -> None:
        _copy_weights_(transformer.time_text_embed)
        _copy_weights_(transformer.norm_out)
        if file := _assistant(model):
            from .assistant_lora import add_assistant_

            transformer.assistant = add_assistant_(transformer, file, DTYPES[model.dtype])

    @contextmanager
    def drawing(self, transformer: Any) -> Iterator[None]:
        assistant = getattr(transformer, "assistant", None)
        training_guidance = transformer.guidance
        transformer.guidance = transformer.drawn_guidance
        if assistant:
            assistant.is_on = False
        try:
            yield
        finally:
            transformer.guidance = training_guidance
            if assistant:
                assistant.is_on = True

    def num_noise_levels(self, transformer: Any) -> int:
        return NUM_LEVELS_FLUX if transformer.time_text_embed.has_guidance else NUM_LEVELS

    def predict(
        self,
        transformer: Any,
        x_sigma: Tensor,
        sigma: Tensor,
        text: Sequence[Tensor],
        reference: Tensor | None = None,
        route: Route | None = None,
    ) -> Tensor:
        device, dtype = input_form(transformer, _weight(transformer.x_embedder))
        height, width = x_sigma.shape[-2:]
        image = pack(x_sigma.to(device, dtype))
        num_tokens, reference_size = image.shape[1], None
        if reference is not None:  # its tokens follow the image's; the velocity predicted for them is discarded
            reference_size = (reference.shape[-2], reference.shape[-1])
            image = torch.cat([image, pack(reference.to(device, dtype))], dim=1)
        all_tokens, pooled = part_text(text, transformer.time_text_embed.pooled_width)
        tokens, mask = batch_text(all_tokens, num_image_tokens=image.shape[1])
        sigma = sigma.to(device, torch.float32)
        guidance = torch.full_like(sigma, transformer.guidance) if transformer.time_text_embed.has_guidance else None
        velocity = transformer(
            hidden_states=image,
            encoder_hidden_states=tokens.to(device, dtype),
            pooled_projections=pooled.to(device, dtype),
            timestep=sigma,
            guidance=guidance,
            attention_mask=None if mask is None else mask.to(device),
            image_rotary_emb=rope(transformer, tokens.shape[1], height, width, device, reference_size),
            route=route if route is None else route.keeping(num_tokens, image.shape[1] - num_tokens),
        )[0][:, :num_tokens]
        return unpack(velocity.to(torch.promote_types(velocity.dtype, torch.float32)), height, width)

    def _set_guidance(self, transformer: Any, model: ModelConfig) -> Any:
        """Set the transformer's guidance for training and for sampling, see drawing."""
        assert model.flux is not None, "a Flux model config has flux options"
        transformer.guidance, transformer.drawn_guidance = model.flux.guidance, model.flux.drawn_guidance
        return transformer

    def check_files(self, part: Part, weights: Weights) -> None:
        if weights.kind is TRANSFORMER:
            _check_channels(part, weights)

    def _check_assistant(self, model: ModelConfig) -> None:
        from .assistant_lora import check_assistant

        file = _assistant(model)
        assert file is not None
        check_assistant(self.shared_transformer(model), file)

    def _check_clip(self, model: ModelConfig, needs_weights: bool) -> None:
        assert model.flux is not None
        if not model.flux.clip_file and model.repo and not is_local(model.repo):
            check_hub(model.repo, model.folders["clip"], needs_weights)
            return
        files = find_clip(model).files
        if fault := part_fault(files, "clip", model.family):
            raise UserError.at(files[0].name, f"{fault} ({files[0]})")
        Weights(files, CLIP)


def _assistant(model: ModelConfig) -> Path | None:
    assert model.flux is not None
    return Path(model.flux.assistant_file) if model.flux.assistant_file else None


def _flavour(model: ModelConfig) -> FluxFlavour:
    return FLAVOURS.get(model.flavour, FLAVOURS["dev"])


def _check_channels(part: Part, weights: Weights) -> None:
    channels = flux_config(part, weights)["in_channels"]
    if channels != LATENT_CHANNELS:
        file = weights.files[0]
        raise UserError.at(
            file.name,
            f"takes {channels} channels per token instead of {LATENT_CHANNELS}: it is a Flux model for inpainting or "
            f"for control images (Fill, Canny, Depth), which can't be trained here; use a text-to-image model ({file})",
        )


def _weight(layer: Any) -> Tensor:
    """Return the weight of a layer that is never quantized but may have an adapter."""
    return getattr(layer, "base", layer).weight


@torch.no_grad()
def _copy_weights_(module: nn.Module) -> None:
    """Copy a module's weights to newly allocated memory.

    On a CPU, the rounding of a matrix-vector product depends on the matrix's memory alignment. Memory-mapped files (the
    model's, the cache of quantized bases) are aligned differently: the difference is 1e-7, and equal requests would not
    write equal bytes.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


@torch.no_grad()
def _swap_halves_(linear: nn.Linear) -> None:
    """Change the row order from the original layout (shift, scale) to diffusers' (scale, shift)."""
    for name, parameter in linear.named_parameters():
        setattr(linear, name, nn.Parameter(parameter.roll(len(parameter) // 2, 0), requires_grad=False))
