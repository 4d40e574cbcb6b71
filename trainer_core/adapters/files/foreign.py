"""What other programs store in adapter files beside the updates: scales in the header, keys of other parts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from .keys import ORIGINAL_PREFIXES

METADATA = "lora_adapter_metadata"  # diffusers' name for the peft config in a file's header
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's own pair of files
WRAPPERS = ("base_model.model.", *ORIGINAL_PREFIXES)
# Key of another part -> its name.
TEXT_ENCODERS = re.compile(
    r"(base_model\.model\.)?(lora_te\d?_|text_encoders?(_\d)?\.|te\d?\.|clip_[lg]\.|t5xxl\.|bundle_emb\.)"
)
ADAPTER_NAME = re.compile(
    r"\.(lora_[AB]|lora_magnitude_vector|lora_embedding_[AB])\.(?!weight$|bias$)([^.]+)(\.weight|\.bias|)$"
)
# Ending of a key that changes weights in another way -> its name.
OTHER_CHANGES = {
    ".lora_B.bias": "bias differences", ".lora_up.bias": "bias differences", ".diff_b": "bias differences",
    ".b_norm": "norm differences", ".w_norm": "norm differences", ".diff": "full weight differences",
    ".set_weight": "full weights",
}  # fmt: skip


def left_out_reason(key: str) -> str:
    """Return what a key belongs to if it is no update of the transformer's layers; "" if it may be one."""
    if TEXT_ENCODERS.match(key):
        return "text encoders"
    reason = next((what for end, what in OTHER_CHANGES.items() if key.endswith(end)), "")
    is_norm = re.search(r"norm[^.]*\.(diff|diff_b)$", key) or ".norm.diff" in key
    return "norm differences" if reason and is_norm else reason


def without_adapter_name(key: str) -> tuple[str, str]:
    """Return a key without the name of peft's adapter, and that name; "" if the key has none."""
    match = ADAPTER_NAME.search(key)
    if not match:
        return key, ""
    return f"{key[: match.start()]}.{match[1]}{match[3]}", match[2]


def without_wrappers(name: str) -> str:
    """Remove every prefix that names the model or peft's wrapper, in any order."""
    prefix = next((prefix for prefix in WRAPPERS if name.startswith(prefix)), "")
    return without_wrappers(name[len(prefix) :]) if prefix else name


def peft_config(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the transformer's peft config, from the header as diffusers writes it or from the file beside; {} if none.

    Raises:
        UserError: It is damaged.
    """
    text = (metadata or {}).get(METADATA, "")
    beside = path.with_name(PEFT_CONFIG)
    try:
        if text:
            config = json.loads(text)
            return {key.removeprefix("transformer."): value for key, value in config.items()}
        if path.name == PEFT_FILE and beside.is_file():
            return dict(json.loads(beside.read_text("utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        where = f"{METADATA} in its header" if text else str(beside)
        raise UserError.at(path.name, f"its alpha can't be read: {where} is damaged ({error})") from error
    return {}


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
