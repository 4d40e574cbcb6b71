"""Tell which tool wrote a LoRA file, from its metadata and the form of its keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..reader import EDIT, LoraReader

Keys = tuple[str, ...]


@dataclass(frozen=True)
class Sign:
    """Something that shows which tool wrote a file.

    Args:
        tool: Name of the tool.
        evidence: What shows it, in words.
        test: Returns whether metadata and keys show it.
    """

    tool: str
    evidence: str
    test: Callable[[Mapping[str, str], Keys], bool]


def _has(*names: str) -> Callable[[Mapping[str, str], Keys], bool]:
    return lambda metadata, keys: any(name in metadata for name in names)


def _starts(*prefixes: str) -> Callable[[Mapping[str, str], Keys], bool]:
    return lambda metadata, keys: any(key.startswith(prefixes) for key in keys)


def _module(start: str) -> Callable[[Mapping[str, str], Keys], bool]:
    return lambda metadata, keys: metadata.get("ss_network_module", "").startswith(start)


def _is_ai_toolkit(metadata: Mapping[str, str], keys: Keys) -> bool:
    try:
        software = json.loads(metadata.get("software", "{}"))
    except (ValueError, RecursionError):
        return False
    return isinstance(software, dict) and software.get("name") == "ai-toolkit"


def _has_form(prefix: str, end: str, alpha: bool | None = None) -> Callable[[Mapping[str, str], Keys], bool]:
    def test(metadata: Mapping[str, str], keys: Keys) -> bool:
        has_alpha = any(key.endswith(".alpha") for key in keys)
        return any(key.startswith(prefix) and key.endswith(end) for key in keys) and alpha in (None, has_alpha)

    return test


# The first sign that is there counts: metadata of one tool before the form of keys, which several share.
SIGNS = (
    Sign("ChromaTrainer", "its record chroma_trainer", _has("chroma_trainer", EDIT)),
    Sign("ai-toolkit", "software in its metadata", _is_ai_toolkit),
    Sign("OneTrainer", "ot_ entries in its metadata", _has("ot_branch", "ot_revision", "ot_config")),
    Sign("OneTrainer", "keys that start with lora_transformer_ or " "bundle_emb", _starts("lora_transformer_", "bundle_emb.")),
    Sign("SimpleTuner with LyCORIS", "keys that start with lycoris_", _starts("lycoris_")),
    Sign("LyCORIS in kohya's sd-scripts", "ss_network_module in its metadata", _module("lycoris")),
    Sign("kohya's sd-scripts", "the record of a training in its " "metadata", _has("ss_session_id", "ss_training_started_at", "ss_sd_scripts_commit_hash")),
    Sign("kohya's sd-scripts (merged, resized or " "converted)", "ss_network_module in its metadata", _module("networks.")),
    Sign("diffusers or SimpleTuner", "lora_adapter_metadata in its metadata", _has("lora_adapter_metadata")),
    Sign("XLabs' trainer", "keys with .processor.", lambda metadata, keys: any(".processor." in key for key in keys)),
    Sign("peft", "keys that start with base_model.model.", _starts("base_model.model.")),
    Sign("ComfyUI (Extract and Save LoRA)", "full differences beside diffusion_model. " "keys", lambda metadata, keys: any(key.startswith("diffusion_model.") and key.endswith((".diff", ".diff_b")) for key in keys)),
    Sign("ComfyUI (Train LoRA) or another tool with ComfyUI's names", "lora_up, lora_down and alpha under " "diffusion_model.", _has_form("diffusion_model.", ".lora_up.weight", True)),
    Sign("ComfyUI (Extract and Save LoRA) or another tool with ComfyUI's names", "lora_up and lora_down under " "diffusion_model., without alpha", _has_form("diffusion_model.", ".lora_up.weight", False)),
    Sign("diffusion-pipe or ai-toolkit", "lora_A and lora_B under " "diffusion_model.", _has_form("diffusion_model.", ".lora_A.weight")),
    Sign("a tool with kohya's names", "keys that start with lora_unet_", _starts("lora_unet_")),
    Sign("diffusers, SimpleTuner or another tool with diffusers' " "names", "keys that start with transformer.", _starts("transformer.")),
)  # fmt: skip


def origin_of(lora: LoraReader) -> tuple[str, str]:
    """Return the tool that wrote a file, and how this is known. The name is "unknown" if nothing shows it."""
    keys = tuple(lora.entries)
    sign = next((sign for sign in SIGNS if sign.test(lora.metadata, keys)), None)
    if sign is None:
        return "unknown", "no metadata and no form of keys that is known here"
    name = sign.tool
    if EDIT in lora.metadata:
        name = f"{name} ({edit_of(lora).get('operation', 'edited')})"
    return name, sign.evidence


def edit_of(lora: LoraReader) -> dict[str, object]:
    """Return the record of how a tool made this file from others; {} if it was trained."""
    try:
        value = json.loads(lora.metadata.get(EDIT, "{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
