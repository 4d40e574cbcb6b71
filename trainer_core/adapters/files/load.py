"""Reading adapters' files of the formats in the wild, and putting them on a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import UserError
from ...registry import load, names
from ..inject import replace_
from ..layer import AdapterLayer, IncompatibleUpdate, Update
from ..lora import LoraPair
from .keys import Place, original_place, without_prefix

__all__ = ["LoraPair", "apply_lora_", "file_names", "kohya_name", "layer_updates", "read_lora", "read_tensors"]

KOHYA_PREFIX = "lora_unet_"
KOHYA_LIKE = ("lycoris_", "lora_transformer_")  # SimpleTuner's and OneTrainer's, over diffusers' names
NUM_EXAMPLES = 3


def update_types() -> tuple[type[Update], ...]:
    """Every form that a layer's update may have in a file."""
    return tuple(dict.fromkeys(load("adapter", name).update_type for name in names("adapter")))


def read_lora(path: Path | str) -> dict[str, Update]:
    """Updates by module name, as the file has it: diffusers' or the original names, without the model's prefix.

    Understands `transformer.X.lora_A.weight`, `diffusion_model.X.lora_down.weight` with `.alpha`, kohya's `lora_unet_X`, peft's and
    ComfyUI's DoRA, and LyCORIS' `lokr_*` and `hada_*`.

    Raises:
        UserError: not a safetensors file, or it holds other keys than those.
    """
    types = update_types()
    ends = sorted({end for kind in types for end in kind.keys}, key=len, reverse=True)
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in read_tensors(path).items():
        end = next((end for end in ends if key.endswith(end)), "")
        if end:
            parts.setdefault(_module(key[: -len(end)]), {})[end] = tensor
        else:
            unknown.append(key)
    found = {module: _update(part, types) for module, part in parts.items()}
    unknown += [module for module, update in found.items() if update is None]
    if unknown or not parts:
        shown = ", ".join(sorted(unknown)[:NUM_EXAMPLES]) or "nothing"
        raise UserError.at(Path(path).name, f"is no LoRA, DoRA, LoKr or LoHa file: it holds {shown} ({path})")
    return {module: update for module, update in found.items() if update is not None}


def _update(part: Mapping[str, Tensor], types: tuple[type[Update], ...]) -> Update | None:
    for kind in types:
        if part.keys() <= kind.keys.keys():
            update = kind.from_parts({kind.keys[end]: tensor for end, tensor in part.items()})
            if update is not None:
                return update
    return None


def _module(name: str) -> str:
    for prefix in KOHYA_LIKE:
        if name.startswith(prefix):
            return KOHYA_PREFIX + name[len(prefix) :]
    return without_prefix(name.removeprefix("base_model.model."))


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


def layer_updates(transformer: nn.Module, path: Path | str) -> dict[str, Update]:
    """A file's updates by the layer they are for. Fused ones of the original layout are split along their rows.

    Raises:
        UserError: a key fits no layer of this model; says how many and which.
    """
    updates = read_lora(path)
    found, bad = match(transformer, updates)
    if bad:
        shown = ", ".join(sorted(bad.values())[:NUM_EXAMPLES])
        raise UserError.at(
            Path(path).name,
            f"is not a LoRA of this model: {len(bad)} of {len(updates)} layers do not fit, such as {shown} ({path})",
        )
    return found


def match(transformer: nn.Module, updates: Mapping[str, Update]) -> tuple[dict[str, Update], dict[str, str]]:
    """A file's updates by layer, and in words those of its names that fit none."""
    by_file_name = file_names(transformer)
    bad = {name: name for name in updates if name not in by_file_name}
    found: dict[str, Update] = {}
    for name, update in updates.items():
        for module, place in by_file_name.get(name, ()):
            try:
                # Fused layers all have the model's width as inputs.
                part = update.rows(place.rows(update.shape[1])) if place.part is not None else update
                part = part.swap_halves() if place.is_swapped else part
            except IncompatibleUpdate as fault:
                bad[name] = f"{name} ({fault})"
                continue
            if part.shape == _shape(transformer.get_submodule(module)):
                found[module] = part
            else:
                bad[name] = name
    return found, bad


def apply_lora_(transformer: nn.Module, path: Path | str, strength: float = 1.0) -> dict[str, AdapterLayer]:
    """Put a file on a model, for sampling.

    Raises:
        UserError: as of layer_updates.
    """
    layers = {}
    for name, update in layer_updates(transformer, path).items():
        layer = layers[name] = replace_(transformer, name, update.layer)
        layer.strength = float(strength)
    return layers


def _shape(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, (nn.Linear, AdapterLayer))
    return module.out_features, module.in_features


def file_names(transformer: nn.Module) -> dict[str, list[tuple[str, Place]]]:
    """Name in a file -> the layers it is for, and their rows. Names: diffusers', the original ones, kohya's of both."""
    found: dict[str, list[tuple[str, Place]]] = {}
    for module, layer in transformer.named_modules():
        if not isinstance(layer, (nn.Linear, AdapterLayer)) or module.endswith(".base"):
            continue
        found[module] = [(module, Place(module))]
        found[kohya_name(module)] = found[module]
        try:
            place = original_place(module)
        except KeyError:
            continue
        if place.module != module:
            for name in (place.module, kohya_name(place.module)):
                found.setdefault(name, []).append((module, place))
    return found


def kohya_name(module: str) -> str:
    return KOHYA_PREFIX + re.sub(r"\.", "_", module)
