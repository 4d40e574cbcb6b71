"""Optional packages that quantization levels, optimizers and sage attention need. Imports neither them nor torch."""

from __future__ import annotations

import importlib.metadata

from ..config.model import QuantizationConfig
from ..config.validation import ValidationConfig
from ..errors import Problem

# Last word of a level, which is the name of the extra (except for quanto, a dependency) -> package.
EXTRAS = {
    "quanto": "optimum-quanto",
    "bnb": "bitsandbytes",
    "torchao": "torchao",
    "sage": "sageattention",
}


def missing_for(level: str) -> str:
    """Return "" if the package of a level (or of an extra) is installed, else what is missing and how to install it."""
    extra = level.rpartition("-")[2]
    if extra not in EXTRAS or version_of(EXTRAS[extra]):
        return ""
    package = EXTRAS[extra]
    by_extra = "" if extra == "quanto" else f', or pip install "chroma-trainer[{extra}]"'
    return f"{package} is not installed; run pip install {package}{by_extra}"


def missing_packages(config: QuantizationConfig) -> list[Problem]:
    """Return a problem for each level whose package is not installed."""
    levels = {field: getattr(config, field) for field in ("level", "text_encoder")}
    return [Problem(field, f"{level}: {missing_for(level)}") for field, level in levels.items() if missing_for(level)]


def missing_for_drawing(settings: ValidationConfig | None) -> list[Problem]:
    """Return a problem if the attention kernel for sampling images is not installed."""
    missing = missing_for(settings.attention) if settings else ""
    return [Problem("attention", f"sage: {missing}; or use same")] if missing else []


def missing_for_optimizer(name: str) -> list[Problem]:
    """Return a problem if the package of an optimizer is not installed."""
    missing = missing_for("bnb") if name.startswith("bnb-") else ""
    text = f"{name}: {missing}; or choose adamw_bf16, which needs no extra package"
    return [Problem("optimizer", text)] if missing else []


def version_of(package: str) -> str:
    """Return the version of a package, or "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
