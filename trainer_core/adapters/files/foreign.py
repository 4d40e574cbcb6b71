"""What other programs store in adapter files beside the updates: keys of other parts, wrappers and adapter names."""

from __future__ import annotations

import re

from .keys import ORIGINAL_PREFIXES

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
