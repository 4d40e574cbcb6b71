"""Read the scale of a LoRA that peft saved: it is in adapter_config.json next to adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError, reason_of

MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def config_file(path: Path | str) -> Path | None:
    """Return the config of a LoRA file in a folder of peft's, or None for any other file."""
    config = Path(path).with_name(CONFIG)
    return config if Path(path).name == MODEL and config.is_file() else None


def read_config(file: Path) -> Mapping[str, Any]:
    """Return the config of a LoRA.

    Raises:
        UserError: The file is not readable, or belongs to an adapter of another kind.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError.at(file.name, f"is not a readable config of peft: {reason_of(error)} ({file})") from error
    if kind != "LORA":
        raise UserError.at(
            file.name, f"belongs to an adapter of peft's type {kind}; only its type LORA can be read ({file})"
        )
    return config


def alpha_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the alpha that gives a layer peft's scale as alpha / rank.

    Args:
        config: See read_config.
        module: Name of the layer.
        rank: Rank of its tensors.
    """
    patterns = (config.get("alpha_pattern") or {}).items()
    own = (value for pattern, value in patterns if re.fullmatch(rf"(.*\.)?({pattern})", module))
    alpha = float(next(own, config.get("lora_alpha", rank)))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
