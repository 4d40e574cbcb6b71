"""Read the scale of a LoRA that peft or diffusers saved: in adapter_config.json beside the file, or in its header."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError, reason_of

METADATA = "lora_adapter_metadata"  # diffusers' name for the peft config in a file's header
MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's own pair of files
LORA = "LORA"  # peft's name of the type


def config_file(path: Path | str) -> Path | None:
    """Return the config of a LoRA file in a folder of peft's, or None for any other file."""
    config = Path(path).with_name(CONFIG)
    return config if Path(path).name == MODEL and config.is_file() else None


def peft_config(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the transformer's peft config, from the header as diffusers writes it or from the file beside; {} if none.

    Raises:
        UserError: It is damaged.
    """
    if text := (metadata or {}).get(METADATA, ""):
        config = _parse(text, path.name, f"its alpha can't be read: {METADATA} in its header is damaged")
        return {key.removeprefix("transformer."): value for key, value in config.items()}
    beside = config_file(path)
    if beside is None:
        return {}
    config = _parse(beside.read_bytes(), beside.name, f"is not a readable config of peft ({beside})")
    if (kind := config.get("peft_type", LORA)) != LORA:
        raise UserError.at(
            beside.name, f"belongs to an adapter of peft's type {kind}; only its type {LORA} can be read ({beside})"
        )
    return config


def _parse(text: str | bytes, field: str, message: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError.at(field, f"{message}: {reason_of(error)}") from error
    if not isinstance(config, dict):
        raise UserError.at(field, f"{message}: it is no JSON object")
    return config


def alpha_of(config: Mapping[str, Any], module: str, rank: int) -> float | None:
    """Return a module's alpha by a peft config, such that its scale is alpha / rank; None if the config says nothing.

    Args:
        config: See peft_config.
        module: Name of the module, as in the file.
        rank: Rank of its factors.
    """
    alpha = config.get("lora_alpha")
    pattern = config.get("alpha_pattern")
    for name, value in (pattern if isinstance(pattern, dict) else {}).items():
        if module == name or module.endswith(f".{name}") or _matches(name, module):
            alpha = value
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        return None
    return alpha * math.sqrt(rank) if config.get("use_rslora") is True else float(alpha)


def _matches(pattern: str, module: str) -> bool:
    """Return whether a name of alpha_pattern, which may be a regular expression, matches a module as in peft."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return False
