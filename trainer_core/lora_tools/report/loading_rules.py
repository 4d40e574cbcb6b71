"""Which keys ComfyUI and diffusers load, by their names. What they do not load changes nothing, and no error says so.

The rules were read from ComfyUI 0.33 (comfy/lora.py) and diffusers 0.42 (FluxLoraLoaderMixin), and are tested against
both.
"""

from __future__ import annotations

from ...adapters.files.foreign import left_out_reason
from ...adapters.files.grouping import module_name, split_key
from ...adapters.files.keys import layers_of, original_place
from ...adapters.files.load import kohya_name
from ..reader import LoraReader

COMFYUI, DIFFUSERS = "ComfyUI", "diffusers"
NATIVE, WRAPPED = "diffusion_model.", "transformer."
FLAT = ("lycoris_", "lora_transformer_")
UNREAD_BY_COMFYUI = (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_magnitude_vector.default.weight")
OF_DIFFUSERS = (".lora_A.weight", ".lora_B.weight", ".alpha", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
OF_KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")
KOHYA_MARK = ".lora_down.weight"  # one such key, and diffusers reads the whole file as kohya's


def unloaded_keys(lora: LoraReader, unknown: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Return the keys of the transformer's layers that each program does not load.

    Args:
        lora: The LoRA.
        unknown: Module names that are no layers of the base model.
    """
    keys = [key for key in lora.entries if left_out_reason(key) != "text encoders"]
    is_kohya = any(KOHYA_MARK in key for key in keys)
    wrong = {key for module in unknown for key in lora.groups.parts.get(module, {}).values()} | set(lora.groups.unknown)
    lists: dict[str, list[str]] = {COMFYUI: [], DIFFUSERS: []}
    for key in keys:
        name, end = split_key(key)
        if key in wrong or key in lora.groups.repeated or not _is_loaded_by_comfyui(key, name, end):
            lists[COMFYUI].append(key)
        if key in wrong or key in lora.groups.repeated or not _is_loaded_by_diffusers(name, end, is_kohya):
            lists[DIFFUSERS].append(key)
    return lists


def _is_loaded_by_comfyui(key: str, name: str, end: str) -> bool:
    if not end:  # ComfyUI adds full differences, and sets full weights, of any parameter
        stem = next((key.removesuffix(end) for end in (".diff", ".diff_b", ".set_weight") if key.endswith(end)), "")
        return stem.startswith(NATIVE)
    layers = layers_of(module_name(name))
    if not layers or end in UNREAD_BY_COMFYUI:
        return False
    diffusers = layers[0][0]
    original = original_place(diffusers).module
    forms = {f"{WRAPPED}{diffusers}", diffusers, f"{NATIVE}{original}", kohya_name(original)}
    forms |= {prefix + diffusers.replace(".", "_") for prefix in FLAT}
    return name in forms or name == f"{NATIVE}{original}_qkv"


def _is_loaded_by_diffusers(name: str, end: str, is_kohya: bool) -> bool:
    layers = layers_of(module_name(name))
    if not layers:
        return False
    diffusers = layers[0][0]
    if not is_kohya:
        return end in OF_DIFFUSERS and name == f"{WRAPPED}{diffusers}"
    inside = diffusers.startswith(("transformer_blocks.", "single_transformer_blocks."))
    return inside and end in OF_KOHYA and name == kohya_name(original_place(diffusers).module)
