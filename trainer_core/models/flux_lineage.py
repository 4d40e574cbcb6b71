"""What Chroma, Radiance and Flux.1 have in common: files in two layouts, blocks, VAE, and token positions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.files.keys import original_parameter
from ..config.model import ModelConfig
from ..devices import DTYPES
from ..errors import Problem, UserError
from ..flow.sigmas import NUM_LEVELS
from ..host import collect
from ..storage.model_header import stamp_of
from .family import Convert
from .latent_packing import image_ids
from .loading.header_check import part_fault
from .loading.locate import (
    RELEASED,
    SINGLE_FILES,
    Part,
    cached_alone,
    find_cached,
    find_part,
    is_hub_id,
    is_local,
    is_offline,
)
from .loading.weights import T5, VAE, Kind, Layout, Weights, load_weights_, mark_packed_, same_names

MAX_ROPE_GRIDS = 32  # image shapes with cached positions: every bucket of an ordinary dataset
MAX_SHARED = 2  # transformers without weights that a family holds: the trained model's and the sampling one's


class FluxLikeFamily:
    """Members of models.family.Family that the families share.

    Attributes:
        transformer_kind: Identifies the family's transformer in files.
        parts: Parts of the model that are files.
        ignored_keys: Keys of the transformer's files that describe it and hold no weights.
    """

    pixel_step, latent_channels, latent_factor = 16, 16, 8
    transformer_kind: ClassVar[Kind]
    parts: ClassVar[tuple[str, ...]] = tuple(SINGLE_FILES)
    ignored_keys: ClassVar[tuple[str, ...]] = ()

    @cached_property
    def _shared(self) -> dict[str, Any]:
        """Transformers without weights, by what decides them. A family lives as long as a request."""
        return {}

    def describe_transformer(self, model: ModelConfig) -> Part:
        """Describe the transformer's files and config, without downloading weights."""
        raise NotImplementedError

    def build_on_meta(self, part: Part, weights: Weights) -> Any:
        """Create the transformer of these files on the meta device."""
        raise NotImplementedError

    def check_files(self, part: Part, weights: Weights) -> None:
        """Do further checks of a part's files. Raises UserError if they fail."""

    def num_noise_levels(self, transformer: Any) -> int:
        """See Family. ComfyUI's templates for these models contain ModelSamplingAuraFlow."""
        return NUM_LEVELS

    def part_problems(self, model: ModelConfig, needs_weights: bool = True) -> list[Problem]:
        """Return the problems with the dtype and with each part's files."""
        problems: list[Problem] = []
        if model.dtype not in DTYPES:
            problems.append(Problem("dtype", f"{model.dtype!r} is not one of {', '.join(DTYPES)}"))
        for part in self.parts:
            collect(problems, self._check_part, model, part, needs_weights)
        return problems

    def read_transformer(self, model: ModelConfig, convert: Convert | None) -> tuple[Any, Weights]:
        """Load the transformer. Return it and its files."""
        part = find_part(model, "transformer")
        weights = Weights(part.files, self.transformer_kind, mapped=convert is None)
        transformer = self._take_shared(part) or self.build_on_meta(part, weights)
        load_weights_(
            transformer, weights, lambda name: self.dtype_of(name, DTYPES[model.dtype]),
            self.layout_of(transformer, weights), lambda key: key in self.ignored_keys, convert,
        )  # fmt: skip
        return transformer, weights

    def dtype_of(self, parameter: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a parameter of the transformer is loaded in, where the model's is `dtype`."""
        return dtype

    def layout_of(self, transformer: Any, weights: Weights) -> Layout:
        """Return which keys of the files hold a parameter of the transformer."""
        return original_layout(transformer.inner_dim) if is_original(weights) else same_names

    def empty_transformer(self, model: ModelConfig) -> nn.Module:
        return self._empty_of(self.describe_transformer(model))

    def shared_transformer(self, model: ModelConfig) -> nn.Module:
        part = self.describe_transformer(model)
        key = _key_of(part)
        with torch.inference_mode(False):  # a check may run in ComfyUI's, and the training loads into it
            transformer = self._shared.pop(key, None) or self._empty_of(part)
        if key:
            self._shared[key] = transformer  # the last one used is the last one dropped
            while len(self._shared) > MAX_SHARED:
                self._shared.pop(next(iter(self._shared)))
        return transformer

    def _take_shared(self, part: Part) -> Any:
        """Return the shared transformer of these files, which is the caller's from now on; None where it can't be loaded into.

        Before a download the config alone is known.
        """
        keys = [key for key in (_key_of(part), _key_of(Part((), part.config))) if key in self._shared]
        transformer = self._shared.pop(keys[0]) if keys else None
        is_packed = transformer is not None and any(hasattr(module, "packed") for module in transformer.modules())
        return None if is_packed else transformer

    def _empty_of(self, part: Part) -> Any:
        """Return the transformer of these files on the meta device, with a note on each layer that a file packs."""
        weights = Weights(part.files, self.transformer_kind)
        transformer = self.build_on_meta(part, weights)
        if part.files:
            mark_packed_(transformer, weights, self.layout_of(transformer, weights))
        return transformer

    def load_codec(self, model: ModelConfig, device: torch.device) -> Any:
        from .codec import load_vae

        return load_vae(model, device)

    def codec_config(self, model: ModelConfig) -> dict[str, Any]:
        from .codec import vae_config

        return vae_config(model)

    def empty_codec(self, model: ModelConfig) -> nn.Module | None:
        from .codec import empty_vae

        return empty_vae(model)

    def loss_weight(self, transformer: Any, sigma: Tensor) -> Tensor | None:
        return None

    def blocks(self, transformer: Any) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def _check_part(self, model: ModelConfig, part: str, needs_weights: bool) -> None:
        single = getattr(model, SINGLE_FILES[part])
        if is_hub_id(single):
            if cached_alone(single, part) is None:
                check_hub(single, part, needs_weights)
            return
        if not single and model.repo and not is_local(model.repo):
            check_hub(model.repo, model.folders.get(part, part), needs_weights)
            return
        located = find_part(model, part)
        if fault := part_fault(located.files, part, model.family, located.config):
            raise UserError.at(located.files[0].name, f"{fault} ({located.files[0]})")
        kinds = {"transformer": self.transformer_kind, "text_encoder": T5, "vae": VAE}
        self.check_files(located, Weights(located.files, kinds[part]))


def _key_of(part: Part) -> str:
    """Return what decides a transformer without weights: its config and its files. "" for files that may be changing."""
    stamps = [stamp_of(file) for file in part.files]
    return json.dumps([part.config, stamps], sort_keys=True) if all(stamps) else ""


def rope(
    transformer: Any,
    num_text: int,
    height: int,
    width: int,
    device: torch.device,
    beside: tuple[int, int] | None = None,
    patch: int = 2,
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of all positions, fp32. Text is at (0, 0, 0), where they are 1 and 0.

    Args:
        transformer: The model, which caches them.
        num_text: Number of text tokens.
        height: Height of the latents.
        width: Width of the latents.
        device: Device of the result.
        beside: Height and width of reference latents. Their tokens follow the image's and are at (1, y, x).
        patch: Edge of a token in latent cells.
    """
    cache: dict[Any, tuple[Tensor, Tensor]] = transformer.__dict__.setdefault("_rope_by_shape", {})
    key = (height, width, str(device), beside)
    if key not in cache:
        if len(cache) >= MAX_ROPE_GRIDS:
            cache.pop(next(iter(cache)))
        # A preview in inference mode may fill the cache, and training uses it later.
        with torch.inference_mode(False):
            ids = image_ids(height, width, patch=patch)
            if beside:
                ids = torch.cat([ids, image_ids(*beside) + torch.tensor([1.0, 0.0, 0.0])])
            cosines, sines = transformer.pos_embed(ids)
            cache[key] = cosines.to(device), sines.to(device)
    cosines, sines = cache[key]
    shape = num_text, cosines.shape[1]
    return torch.cat([cosines.new_ones(shape), cosines]), torch.cat([sines.new_zeros(shape), sines])


def can_be_planned(repo: str) -> bool:
    """Return whether the configs of a repository's parts come with this package, so that a plan needs none of its files."""
    return repo in RELEASED


def check_hub(repo: str, part: str, needs_weights: bool = True) -> None:
    """Check that a part of a Hub repository is cached or can be downloaded, or is not needed for a plan.

    Raises:
        UserError: It is not in the cache, and HF_HUB_OFFLINE is set.
    """
    if not needs_weights and can_be_planned(repo):
        return
    if find_cached(repo, part) is None and is_offline():
        raise UserError.at(
            "repo",
            f"{repo}/{part} is not in the Hub's cache, and HF_HUB_OFFLINE prevents the download; "
            "unset it, or set a local diffusers folder or single files",
        )


def common_dimensions(weights: Weights) -> dict[str, Any]:
    """Return the constructor arguments that Chroma and Flux share, from the tensor shapes of a file in either layout.

    Raises:
        UserError: A tensor is missing.
    """
    _, in_channels = shape_of(weights, "x_embedder.weight", "img_in.weight")
    return {"in_channels": in_channels, **block_dimensions(weights)}


def block_dimensions(weights: Weights) -> dict[str, Any]:
    """Return the constructor arguments that describe the blocks, which all families share. See common_dimensions."""
    original = is_original(weights)
    hidden, text_width = shape_of(weights, "context_embedder.weight", "txt_in.weight")
    query_norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    head = shape_of(weights, "transformer_blocks.0.attn.norm_q.weight", query_norm)[0]
    dimensions: dict[str, Any] = {
        "num_layers": weights.count("double_blocks" if original else "transformer_blocks"),
        "num_single_layers": weights.count("single_blocks" if original else "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": text_width,
    }
    if head != 128:  # one eighth of the head for time, the rest for y and x, all even, like (16, 56, 56) for 128
        plane = (head - head // 8) // 4 * 2
        dimensions["axes_dims_rope"] = [head - 2 * plane, plane, plane]
    return dimensions


def shape_of(weights: Weights, ours: str, theirs: str) -> tuple[int, ...]:
    """Return a tensor's shape, by its name in diffusers' or in the original layout (a norm's `scale` may be `weight`).

    Raises:
        UserError: The tensor is missing.
    """
    names = (theirs, theirs.replace(".scale", ".weight")) if is_original(weights) else (ours,)
    key = next((name for name in names if name in weights.entries), None)
    if key is None:
        file = weights.files[0]
        raise UserError.at(file.name, f"is not a {weights.kind.name}: {names[0]} is missing ({file})")
    return weights.shape(key)


def is_original(weights: Weights) -> bool:
    """Return whether the file uses the original names, as files of ComfyUI and lodestones do."""
    return not {"img_in.weight", "txt_in.weight"}.isdisjoint(weights.entries)


def original_layout(width: int) -> Layout:
    """Return the layout of ComfyUI's and lodestones' files. Newer ones call a norm's scale `weight`."""

    def layout(parameter: str) -> tuple[Sequence[str], slice]:
        key, place = original_parameter(parameter)
        return (key, key.replace(".scale", ".weight")), place.rows(width)

    return layout


def input_form(transformer: Any, weight: Tensor) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype of a model's inputs.

    Those of a weight, unless the weights are stored in another form than they compute in (full_rank/sharding.py).
    """
    return getattr(transformer, "computes_in", None) or (weight.device, weight.dtype)
