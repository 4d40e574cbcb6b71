"""Read adapter files of all common formats and apply them to a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import UserError
from ..inject import replace_
from ..layer import AdapterLayer, IncompatibleUpdate, Update
from ..lora import LoraPair
from .grouping import group_keys, update_types
from .keys import KOHYA_PREFIX, Place, original_place
from .peft_config import alpha_of, peft_config

__all__ = [
    "LoraFile", "LoraPair", "apply_lora_", "file_names", "kohya_name", "layer_updates", "read_lora", "read_lora_file",
    "read_tensors",
]  # fmt: skip

NUM_EXAMPLES = 3
ALPHA = ".alpha"
DOWNS = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", ".lora_A.default.weight")


@dataclass(frozen=True)
class LoraFile:
    """A file's updates by module name, and what else it contains.

    Attributes:
        updates: See read_lora.
        left_out: Number of keys that are not used, by what they belong to.
    """

    updates: dict[str, Update]
    left_out: Mapping[str, int]

    @property
    def left_out_text(self) -> str:
        """What is not used, in words; "" if everything is."""
        return ", ".join(f"{count} keys of {what}" for what, count in sorted(self.left_out.items()))

    def broken_layers(self) -> list[str]:
        """Return the names of the layers whose update has values that are not finite."""
        return [name for name, update in self.updates.items() if not is_finite(update)]


def read_lora(path: Path | str) -> dict[str, Update]:
    """Read a file's updates by module name as in the file (diffusers' or original names), without the model prefix.

    See read_lora_file.
    """
    return read_lora_file(path).updates


def read_lora_file(path: Path | str) -> LoraFile:
    """Read a file's updates.

    Supported keys: `transformer.X.lora_A.weight`, `diffusion_model.X.lora_down.weight` with `.alpha`, kohya's
    `lora_unet_X`, folders of peft (adapter_model.safetensors, with adapter_config.json), DoRA of peft and ComfyUI, and
    LyCORIS' `lokr_*`, `hada_*` and `oft_blocks`, with any wrapper and adapter name of peft. Without `.alpha`, the
    header that diffusers writes or peft's config gives it. Keys of text encoders and changes that are no adapters (of
    biases and norms) are left out.

    Raises:
        UserError: The file is not a safetensors file, contains other keys, or several adapters.
    """
    types = update_types()
    tensors = read_tensors(path)
    groups = group_keys(tensors)
    parts = {name: {end: tensors[key] for end, key in keys.items()} for name, keys in groups.parts.items()}
    unknown, left_out = groups.unknown, {reason: len(keys) for reason, keys in groups.left_out.items()}
    if groups.repeated:
        left_out["layers that the file has twice"] = len(groups.repeated)
    if len(groups.adapters - {""}) > 1:
        names = ", ".join(sorted(groups.adapters - {""}))
        raise UserError.at(Path(path).name, f"contains several adapters ({names}); save one of them alone ({path})")
    _add_alphas_(parts, Path(path))
    updates = {module: build_update(part, types) for module, part in parts.items()}
    unknown += [module for module, update in updates.items() if update is None]
    if unknown or not parts:
        examples = ", ".join(sorted(unknown)[:NUM_EXAMPLES]) or ", ".join(left_out) or "nothing"
        raise UserError.at(
            Path(path).name, f"is not a LoRA, DoRA, LoKr, LoHa or OFT file: it contains {examples} ({path})"
        )
    return LoraFile({module: update for module, update in updates.items() if update is not None}, left_out)


def _add_alphas_(parts: Mapping[str, dict[str, Tensor]], path: Path) -> None:
    """Add the alpha of the header to each LoRA without one of its own."""
    with safe_open(path, framework="pt", device="cpu") as file:
        config = peft_config(path, file.metadata())
    for module, part in parts.items():
        add_alpha_(part, config, module)


def add_alpha_(part: dict[str, Tensor], config: Mapping[str, Any], module: str) -> None:
    """Add the alpha of a peft config to a LoRA's tensors by suffix, if they have none of their own."""
    down = next((part[end] for end in DOWNS if end in part), None)
    if config and down is not None and ALPHA not in part:
        alpha = alpha_of(config, module, down.shape[0])
        if alpha is not None:
            part[ALPHA] = torch.tensor(alpha, dtype=torch.float64)


def is_finite(update: Update) -> bool:
    return are_finite(value for value in vars(update).values() if isinstance(value, Tensor))


def are_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.float().isfinite().all()) for tensor in tensors)


def build_update(part: Mapping[str, Tensor], types: tuple[type[Update], ...]) -> Update | None:
    for kind in types:
        if part.keys() <= kind.keys.keys():
            update = kind.from_parts({kind.keys[end]: tensor for end, tensor in part.items()})
            if update is not None:
                return update
    return None


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file into its own memory, so that the file can be replaced.

    Raises:
        UserError: The file is not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError.at(Path(path).name, f"is not a readable LoRA file: {error} ({path})") from error


def layer_updates(transformer: nn.Module, path: Path | str) -> dict[str, Update]:
    """Return a file's updates by layer. Fused updates of the original layout are split along their rows.

    Raises:
        UserError: Keys match no layer of this model. The message says how many and which.
    """
    updates = read_lora(path)
    matches, misfits = match(transformer, updates)
    if misfits:
        examples = ", ".join(sorted(misfits.values())[:NUM_EXAMPLES])
        raise UserError.at(
            Path(path).name,
            f"is not a LoRA of this model: {len(misfits)} of {len(updates)} layers do not fit, such as {examples} "
            f"({path})",
        )
    return matches


def match(transformer: nn.Module, updates: Mapping[str, Update]) -> tuple[dict[str, Update], dict[str, str]]:
    """Return a file's updates by layer, and a description of each name in the file that matches no layer."""
    by_file_name = file_names(transformer)
    misfits = {name: name for name in updates if name not in by_file_name}
    matches: dict[str, Update] = {}
    for name, update in updates.items():
        for module, place in by_file_name.get(name, ()):
            try:
                part = part_of(update, place)
            except IncompatibleUpdate as fault:
                misfits[name] = f"{name} ({fault})"
                continue
            if part.fits(_shape(transformer.get_submodule(module))):
                matches[module] = part
            else:
                misfits[name] = name
    return matches, misfits


def part_of(update: Update, place: Place) -> Update:
    """Return the update of one layer from that of the module in a file.

    Raises:
        IncompatibleUpdate: It belongs to a fused layer, and this kind can't be split.
    """
    # Fused layers all have the model's width as inputs.
    part = update.rows(place.rows(update.shape[1])) if place.part is not None else update
    return part.swap_halves() if place.is_swapped else part


def apply_lora_(transformer: nn.Module, path: Path | str, strength: float = 1.0) -> dict[str, AdapterLayer]:
    """Apply a LoRA file to a model, for sampling.

    Raises:
        UserError: See layer_updates.
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
    """Map each possible name in a file (diffusers', original, kohya's forms of both) to its layers and their rows."""
    layers_by_name: dict[str, list[tuple[str, Place]]] = {}
    for module, layer in transformer.named_modules():
        if not isinstance(layer, (nn.Linear, AdapterLayer)) or module.endswith(".base"):
            continue
        layers_by_name[module] = [(module, Place(module))]
        layers_by_name[kohya_name(module)] = layers_by_name[module]
        try:
            place = original_place(module)
        except KeyError:
            continue
        if place.module != module:
            for name in (place.module, kohya_name(place.module)):
                layers_by_name.setdefault(name, []).append((module, place))
    return layers_by_name


def kohya_name(module: str) -> str:
    return KOHYA_PREFIX + re.sub(r"\.", "_", module)
