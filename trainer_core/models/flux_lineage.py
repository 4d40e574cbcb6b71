"""What Chroma and Flux.1 have in common: files in two layouts, blocks, VAE, and where tokens lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.files.keys import original_parameter
from ..config.model import ModelConfig
from ..devices import DTYPES
from ..errors import Problem, UserError
from ..host import collect
from .family import Convert
from .latent_packing import image_ids
from .loading.locate import SINGLE_FILES, Part, find_cached, find_part, is_local, is_offline
from .loading.weights import T5, VAE, Kind, Layout, Weights, load_weights_, same_names

MAX_ROPE_GRIDS = 32  # picture shapes whose positions are kept: every bucket of a usual dataset


class FluxLikeFamily:
    """Members of contract.Family that are the same in both. transformer_kind: what a family's transformer is recognised by."""

    pixel_step = 16
    transformer_kind: ClassVar[Kind]

    def build_on_meta(self, part: Part, weights: Weights) -> Any:
        """The transformer of these files on the meta device."""
        raise NotImplementedError

    def check_files(self, part: Part, weights: Weights) -> None:
        """What more is to be checked of a part's files. Raises: UserError."""

    def part_problems(self, model: ModelConfig) -> list[Problem]:
        """Of the precision, and of each part's files."""
        found: list[Problem] = []
        if model.dtype not in DTYPES:
            found.append(Problem("dtype", f"{model.dtype!r} is not one of {', '.join(DTYPES)}"))
        for part in SINGLE_FILES:
            collect(found, self._check_part, model, part)
        return found

    def read_transformer(self, model: ModelConfig, convert: Convert | None) -> tuple[Any, Weights]:
        """The transformer, filled, and the files it came from."""
        part = find_part(model, "transformer")
        weights = Weights(part.files, self.transformer_kind, mapped=convert is None)
        transformer = self.build_on_meta(part, weights)
        layout = original_layout(transformer.inner_dim) if is_original(weights) else same_names
        load_weights_(transformer, weights, dtype=lambda name: DTYPES[model.dtype], layout=layout, convert=convert)
        return transformer, weights

    def load_codec(self, model: ModelConfig, device: torch.device) -> Any:
        from .codec import load_vae

        return load_vae(model, device)

    def blocks(self, transformer: Any) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def _check_part(self, model: ModelConfig, part: str) -> None:
        if not getattr(model, SINGLE_FILES[part]) and model.repo and not is_local(model.repo):
            check_hub(model.repo, model.folders.get(part, part))
            return
        found = find_part(model, part)
        kinds = {"transformer": self.transformer_kind, "text_encoder": T5, "vae": VAE}
        self.check_files(found, Weights(found.files, kinds[part]))


def rope(
    transformer: Any,
    num_text: int,
    height: int,
    width: int,
    device: torch.device,
    beside: tuple[int, int] | None = None,
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
    if find_cached(repo, part) is None and is_offline():
        raise UserError.at(
            "repo",
            f"{repo}/{part} is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it; "
            "unset it, or name a local diffusers folder or single files",
        )


def common_dimensions(weights: Weights) -> dict[str, Any]:
    """The constructor's arguments that Chroma and Flux share, read off the shapes of a file in either layout.

    Raises:
        UserError: a tensor is missing.
    """
    original = is_original(weights)
    hidden, in_channels = shape_of(weights, "x_embedder.weight", "img_in.weight")
    query_norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    head = shape_of(weights, "transformer_blocks.0.attn.norm_q.weight", query_norm)[0]
    found: dict[str, Any] = {
        "in_channels": in_channels,
        "num_layers": weights.count("double_blocks" if original else "transformer_blocks"),
        "num_single_layers": weights.count("single_blocks" if original else "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": shape_of(weights, "context_embedder.weight", "txt_in.weight")[1],
    }
    if head != 128:  # an eighth of the head for time, the rest for y and x, all even, like (16, 56, 56) of 128
        plane = (head - head // 8) // 4 * 2
        found["axes_dims_rope"] = [head - 2 * plane, plane, plane]
    return found


def shape_of(weights: Weights, ours: str, theirs: str) -> tuple[int, ...]:
    """Shape of a tensor by its name in diffusers' and in the original layout, where a norm's `scale` may be a `weight`.

    Raises:
        UserError: it is missing.
    """
    names = (theirs, theirs.replace(".scale", ".weight")) if is_original(weights) else (ours,)
    found = next((name for name in names if name in weights.entries), None)
    if found is None:
        file = weights.files[0]
        raise UserError.at(file.name, f"is no {weights.kind.name}: {names[0]} is missing ({file})")
    return weights.shape(found)


def is_original(weights: Weights) -> bool:
    """Whether the file has ComfyUI's and lodestones' names."""
    return "img_in.weight" in weights.entries


def original_layout(width: int) -> Layout:
    """Keys of ComfyUI's and lodestones' files; newer ones call a norm's scale `weight`."""

    def layout(parameter: str) -> tuple[Sequence[str], slice]:
        key, place = original_parameter(parameter)
        return (key, key.replace(".scale", ".weight")), place.rows(width)

    return layout
