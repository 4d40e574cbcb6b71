"""Group the keys of a LoRA file by layer, from their names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

from ...registry import load, names
from ..layer import Update
from .foreign import left_out_reason, without_adapter_name, without_wrappers
from .keys import KOHYA_PREFIX

KOHYA_LIKE = ("lycoris_", "lora_transformer_")  # SimpleTuner's and OneTrainer's prefixes, with diffusers' module names
# Names of XLabs' trainer -> ComfyUI's names of the same layers.
XLABS = (
    (r"processor\.qkv_lora1$", "img_attn.qkv"), (r"processor\.qkv_lora2$", "txt_attn.qkv"),
    (r"processor\.proj_lora1$", "img_attn.proj"), (r"processor\.proj_lora2$", "txt_attn.proj"),
    (r"processor\.qkv_lora$", "linear1_qkv"), (r"processor\.proj_lora$", "linear2"),
)  # fmt: skip
XLABS_ENDS = {".down.weight": ".lora_down.weight", ".up.weight": ".lora_up.weight"}


@dataclass
class KeyGroups:
    """The keys of a file.

    Attributes:
        parts: Module name without prefixes -> suffix of a key -> the key.
        left_out: What keys belong to that are no update of a transformer's layer -> these keys.
        unknown: Keys that are neither.
        adapters: Names of peft's adapters; "" for keys without one.
        repeated: Keys that mean the same part of the same layer as an earlier key. They are in no other attribute.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    adapters: set[str] = field(default_factory=set)
    repeated: list[str] = field(default_factory=list)


def update_types() -> tuple[type[Update], ...]:
    """Return the update classes of all adapter kinds."""
    return tuple(dict.fromkeys(load("adapter", name).update_type for name in names("adapter")))


@cache
def _ends() -> tuple[str, ...]:
    return tuple(sorted({end for kind in update_types() for end in kind.keys}, key=len, reverse=True))


def group_keys(keys: Iterable[str]) -> KeyGroups:
    """Group keys by layer. Nothing is refused here."""
    groups = KeyGroups()
    for key in keys:
        plain, adapter = without_adapter_name(key)
        if reason := left_out_reason(plain):
            groups.left_out.setdefault(reason, []).append(key)
            continue
        groups.adapters.add(adapter)
        name, end = split_key(plain)
        if not end:
            groups.unknown.append(key)
        elif end in (part := groups.parts.setdefault(module_name(name), {})):
            groups.repeated.append(key)
        else:
            part[end] = key
    return groups


def split_key(key: str) -> tuple[str, str]:
    """Return a key without its suffix, and the suffix as update classes know it; "" if it is the key of no update."""
    if ".processor." in key and (end := next((end for end in XLABS_ENDS if key.endswith(end)), "")):
        return key[: -len(end)], XLABS_ENDS[end]
    end = next((end for end in _ends() if key.endswith(end)), "")
    return key[: len(key) - len(end)], end


def module_name(name: str) -> str:
    """Return the module's name as in the file, without prefixes of the model, of peft and of other tools."""
    for prefix in KOHYA_LIKE:
        if name.startswith(prefix):
            return KOHYA_PREFIX + name[len(prefix) :]
    name = without_wrappers(name)
    for pattern, original in XLABS if ".processor." in name else ():
        name = re.sub(pattern, original, name)
    return name
