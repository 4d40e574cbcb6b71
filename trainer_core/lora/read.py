"""Reading LoRA files of the formats in the wild, and putting them on a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..problems import UserError
from .inject import LoraLinear, wrap_
from .keys import Place, original_place, without_prefix

DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight")
UP = (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight")
KOHYA_PREFIX = "lora_unet_"
NUM_EXAMPLES = 3


@dataclass(frozen=True)
class LoraPair:
    """One layer's update: Delta W = up @ down; the file's alpha / rank is in up. down: (r, in), up: (out, r)."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def read_lora(path: Path | str) -> dict[str, LoraPair]:
    """Updates by module name, as the file has it: diffusers' or the original names, without the model's prefix.

    Understands `transformer.X.lora_A.weight`, `diffusion_model.X.lora_down.weight` with `.alpha`, and kohya's
    `lora_unet_X`.

    Raises:
        UserError: not a safetensors file, or it holds other keys than those of a plain LoRA.
    """
    tensors = read_tensors(path)
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        module, kind = _split(key)
        if kind:
            parts.setdefault(module, {})[kind] = tensor
        else:
            unknown.append(key)
    unknown += [module for module, part in parts.items() if not {"down", "up"} <= part.keys()]
    if unknown or not parts:
        shown = ", ".join(sorted(unknown)[:NUM_EXAMPLES]) or "nothing"
        raise UserError.at(Path(path).name, f"is not a plain LoRA: it holds {shown} ({path})")
    return {module: _pair(part) for module, part in parts.items()}


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, in memory of its own (so that the file may be replaced).

    Raises:
        UserError: not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError.at(Path(path).name, f"is no readable LoRA file: {error} ({path})") from error


def _split(key: str) -> tuple[str, str]:
    for kind, ends in (("down", DOWN), ("up", UP), ("alpha", (".alpha",))):
        for end in ends:
            if key.endswith(end):
                return without_prefix(key[: -len(end)]), kind
    return key, ""


def _pair(part: Mapping[str, Tensor]) -> LoraPair:
    down, up = part["down"], part["up"]
    if "alpha" in part:
        up = (up.float() * (float(part["alpha"]) / down.shape[0])).to(up.dtype)
    return LoraPair(down, up)


def apply_lora_(transformer: nn.Module, path: Path | str, strength: float = 1.0) -> dict[str, LoraLinear]:
    """Put a LoRA file on a model, for sampling. Fused updates of the original layout are split along their rows.

    Raises:
        UserError: a key fits no layer of this model; says how many and which.
    """
    pairs = read_lora(path)
    by_file_name = _file_names(transformer)
    unknown = [name for name in pairs if name not in by_file_name]
    updates = {
        module: LoraPair(pair.down, pair.up[place.rows(pair.down.shape[1])])
        for name, pair in pairs.items()
        if name in by_file_name
        for module, place in by_file_name[name]
    }
    misshapen = [
        name
        for name, pair in updates.items()
        if (pair.up.shape[0], pair.down.shape[1]) != _shape(transformer.get_submodule(name))
    ]
    if unknown or misshapen:
        num_bad = len(unknown) + len(misshapen)
        shown = ", ".join(sorted([*unknown, *misshapen])[:NUM_EXAMPLES])
        raise UserError.at(
            Path(path).name,
            f"is not a LoRA of this model: {num_bad} of {len(pairs)} layers do not fit, such as {shown} ({path})",
        )
    layers = {}
    for name, pair in updates.items():
        layer = layers[name] = wrap_(transformer, name, pair.rank, alpha=pair.rank)
        with torch.no_grad():
            layer.lora_A.copy_(pair.down)
            layer.lora_B.copy_(pair.up)
        layer.requires_grad_(False)
        layer.strength = float(strength)
    return layers


def _shape(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def _file_names(transformer: nn.Module) -> dict[str, list[tuple[str, Place]]]:
    """Name in a file -> the layers it is for, and their rows. Names: diffusers', the original ones, kohya's of both."""
    found: dict[str, list[tuple[str, Place]]] = {}
    for module, layer in transformer.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        found[module] = [(module, Place(module))]
        found[_kohya(module)] = found[module]
        try:
            place = original_place(module)
        except KeyError:
            continue
        if place.module != module:
            for name in (place.module, _kohya(place.module)):
                found.setdefault(name, []).append((module, place))
    return found


def _kohya(module: str) -> str:
    return KOHYA_PREFIX + re.sub(r"\.", "_", module)
