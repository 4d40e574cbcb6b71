"""Packages that levels (and sage attention) need and that don't come with this one. Imports neither them nor torch."""

from __future__ import annotations

import importlib.metadata

from ..config.model import QuantizationConfig
from ..config.validation import ValidationConfig
from ..errors import Problem

EXTRAS = {
    "bnb": "bitsandbytes",
    "torchao": "torchao",
    "sage": "sageattention",
}  # last word of a level, which is the extra's name -> package


def missing_for(level: str) -> str:
    """'' where the package of a level (or of an extra) is installed, else what is missing and how to get it."""
    extra = level.rpartition("-")[2]
    if extra not in EXTRAS or version_of(EXTRAS[extra]):
        return ""
    return f'{EXTRAS[extra]} is not installed; pip install {EXTRAS[extra]}, or the extra: pip install "chroma-trainer[{extra}]"'


def missing_packages(config: QuantizationConfig) -> list[Problem]:
    """A problem for each level whose package is not installed."""
    levels = {field: getattr(config, field) for field in ("level", "text_encoder")}
    return [Problem(field, f"{level}: {missing_for(level)}") for field, level in levels.items() if missing_for(level)]


def missing_for_drawing(settings: ValidationConfig | None) -> list[Problem]:
    """A problem where the kernel that pictures are drawn with is not installed."""
    missing = missing_for(settings.attention) if settings else ""
    return [Problem("attention", f"sage: {missing}; or use same")] if missing else []


def version_of(package: str) -> str:
    """'' where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
