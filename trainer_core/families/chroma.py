"""Chroma: T5 text, Flux's VAE, a transformer modulated by a frozen approximator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config.model import ModelConfig
from ..config.training import TrainingConfig
from ..config.validation import ValidationConfig
from ..host import collect
from ..problems import Problem, UserError
from .chroma_layout import TRANSFORMER, is_original, original_layout, transformer_config
from .contract import Convert
from .identity import identity_of
from .linears import CHROMA
from .packing import batch_text, image_ids, pack, unpack
from .sources import SINGLE_FILES, Part, cached_folder, describe, find_part, is_local, is_offline, shipped_config
from .tokenizer import find_tokenizer
from .weights import DTYPES, T5, VAE, Weights, load_weights_, same_names

KINDS = {"transformer": TRANSFORMER, "text_encoder": T5, "vae": VAE}
MAX_ROPE_GRIDS = 32  # picture shapes whose positions are kept: every bucket of a usual dataset


class ChromaFamily:
    """The members are those of contract.Family."""

    name = "chroma"
    pixel_step = 16
    full_precision = ("distilled_guidance_layer*", "x_embedder", "context_embedder", "*norm*", "proj_out")
    frozen = CHROMA.frozen
    targets = CHROMA.targets

    def problems(self, model: ModelConfig) -> list[Problem]:
        found: list[Problem] = []
        if model.dtype not in DTYPES:
            found.append(Problem("dtype", f"{model.dtype!r} is not one of {', '.join(DTYPES)}"))
        for part in SINGLE_FILES:
            collect(found, self._check_part, model, part)
        collect(found, self._check_tokenizer, model)
        return found

    def labels(self, model: ModelConfig) -> Mapping[str, str]:
        return {"ss_base_model_version": "chroma", "modelspec.architecture": "chroma/lora"}

    def trained(self, model: ModelConfig, settings: TrainingConfig) -> TrainingConfig:
        return settings

    def drawn(self, model: ModelConfig, settings: ValidationConfig) -> ValidationConfig:
        if settings.sampling == "as set":
            return settings
        # ComfyUI's template of Chroma; flash needs no CFG.
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
            from .t5 import text_identity

            return text_identity(model)
        if part == "codec":
            from .codec import codec_identity

            return codec_identity(model)
        return identity_of(find_part(model, part).files)

    def load_text_encoder(self, model: ModelConfig, device: torch.device, convert: Convert | None = None) -> Any:
        from .t5 import load_t5

        return load_t5(model, device, convert)

    def empty_text_encoder(self, model: ModelConfig, convert: Convert | None = None) -> nn.Module:
        from .t5 import empty_t5

        return empty_t5(model, convert)

    def load_codec(self, model: ModelConfig, device: torch.device) -> Any:
        from .codec import load_vae

        return load_vae(model, device)

    def empty_transformer(self, model: ModelConfig) -> nn.Module:
        part = describe(model, "transformer", shipped_config("chroma_transformer"))
        return _empty(part, Weights(part.files, TRANSFORMER))

    def load_transformer(self, model: ModelConfig, convert: Convert | None = None) -> nn.Module:
        part = find_part(model, "transformer")
        weights = Weights(part.files, TRANSFORMER, mapped=convert is None)
        transformer = _empty(part, weights)
        layout = original_layout(transformer.inner_dim) if is_original(weights) else same_names
        load_weights_(transformer, weights, dtype=lambda name: DTYPES[model.dtype], layout=layout, convert=convert)
        return transformer

    def blocks(self, transformer: Any) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def prepare_(self, transformer: nn.Module, model: ModelConfig) -> None:
        pass

    def drawing(self, transformer: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def predict(
        self, transformer: Any, x_sigma: Tensor, sigma: Tensor, text: Sequence[Tensor], reference: Tensor | None = None
    ) -> Tensor:
        assert reference is None, "Chroma takes no references"
        weight = transformer.distilled_guidance_layer.in_proj.weight  # never adapted, never quantised
        height, width = x_sigma.shape[-2:]
        tokens, mask = batch_text(text, num_image_tokens=height * width // 4)
        velocity = transformer(
            hidden_states=pack(x_sigma.to(weight.device, weight.dtype)),
            encoder_hidden_states=tokens.to(weight.device, weight.dtype),
            timestep=sigma.to(weight.device, torch.float32),
            attention_mask=None if mask is None else mask.to(weight.device),
            image_rotary_emb=rope(transformer, tokens.shape[1], height, width, weight.device),
            return_dict=False,
        )[0]
        return unpack(velocity.to(torch.promote_types(velocity.dtype, torch.float32)), height, width)

    def _check_part(self, model: ModelConfig, part: str) -> None:
        if not getattr(model, SINGLE_FILES[part]) and model.repo and not is_local(model.repo):
            check_hub(model.repo, part)
            return
        Weights(find_part(model, part).files, KINDS[part])

    def _check_tokenizer(self, model: ModelConfig) -> None:
        if is_local(model.repo) or not model.repo or is_offline():
            find_tokenizer(model)


def _empty(part: Part, weights: Weights) -> Any:
    from .chroma_transformer import ChromaTransformer

    with torch.device("meta"):
        transformer = ChromaTransformer.from_config(transformer_config(part, weights))
    transformer.restore_buffers_()
    return transformer


def rope(
    transformer: Any, num_text: int, height: int, width: int, device: torch.device, beside: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions, fp32. Text lies at (0, 0, 0), where they are 1 and 0.

    beside: height and width of latents to start from, whose tokens follow the picture's and lie at (1, y, x).
    """
    kept: dict[Any, tuple[Tensor, Tensor]] = transformer.__dict__.setdefault("_rope_by_shape", {})
    key = (height, width, str(device), beside)
    if key not in kept:
        if len(kept) >= MAX_ROPE_GRIDS:
            kept.pop(next(iter(kept)))
        # A preview under inference mode may be the first to ask, and training reads it.
        with torch.inference_mode(False):
            ids = image_ids(height, width)
            if beside:
                ids = torch.cat([ids, image_ids(*beside) + torch.tensor([1.0, 0.0, 0.0])])
            cosines, sines = transformer.pos_embed(ids)
            kept[key] = cosines.to(device), sines.to(device)
    cosines, sines = kept[key]
    shape = num_text, cosines.shape[1]
    return torch.cat([cosines.new_ones(shape), cosines]), torch.cat([sines.new_zeros(shape), sines])


def check_hub(repo: str, part: str) -> None:
    """Whether a part of a hub's repository can be had.

    Raises:
        UserError: it is not in the cache, and no network may be asked.
    """
    if cached_folder(repo, part) is None and is_offline():
        raise UserError.at(
            "repo",
            f"{repo}/{part} is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it; "
            "unset it, or name a local diffusers folder or single files",
        )
