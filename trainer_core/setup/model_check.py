"""Find settings that contradict the model's files, from file headers alone. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.adapter import NO_LORA
from ..config.flux import FLAVOURS
from ..config.model import ModelConfig
from ..config.request import TrainRequest
from ..errors import Problem, UserError
from ..models.loading.config_file import read_config
from ..models.loading.header_check import GUIDANCE
from ..models.loading.locate import is_local
from ..storage.model_header import model_header_of

ARCHITECTURE_KEYS = ("modelspec.architecture", "ss_base_model_version", "ss_base_model")
FAMILIES = ("chroma", "flux", "radiance")  # as they are named in those values


def contradictions(request: TrainRequest) -> list[Problem]:
    """Return problems of a flavour that its files are not of, and of LoRA files of another model family."""
    model, problems = request.model, []
    has_guidance = _has_guidance(model)
    flavour = FLAVOURS.get(model.flavour) if model.flux else None
    if flavour and has_guidance is not None and has_guidance != flavour.has_guidance:
        others = [name for name, other in FLAVOURS.items() if other.has_guidance == has_guidance]
        what = "has a guidance embedding, as dev" if has_guidance else "has no guidance embedding, as schnell"
        message = (
            f"is {model.flavour}, but {Path(model.transformer_file or model.repo).name} {what} and its finetunes; "
            f"use {', '.join(others[:-1])} or {others[-1]}"
        )
        problems.append(Problem("flavour", message))
    files = [("init_lora", "" if request.adapter.init_lora == NO_LORA else request.adapter.init_lora)]
    files += [("assistant", model.flux.assistant_file)] if model.flux else []
    for field, file in files:
        family = _family_of_lora(Path(file)) if file else ""
        if family and family != model.family:
            flavour = f" {model.flavour}" if model.flavour != model.family else ""
            message = (
                f"{Path(file).name} is a LoRA of {family.title()}, and the model is {model.family.title()}"
                f"{flavour}; choose a LoRA of {model.family.title()}"
            )
            problems.append(Problem(field, message))
    return problems


def _has_guidance(model: ModelConfig) -> bool | None:
    """Return whether the transformer has a guidance embedding. None: its files are not here or can't be read."""
    if model.transformer_file:
        keys = _header(Path(model.transformer_file))
        return any(key.endswith(GUIDANCE) for key in keys) if keys else None
    if not model.repo or not is_local(model.repo):
        return None
    try:
        return bool(read_config(Path(model.repo) / "transformer" / "config.json")["guidance_embeds"])
    except (UserError, KeyError):
        return None


def _family_of_lora(path: Path) -> str:
    """Return the model family that a LoRA file names in its metadata or by a key that one family alone has, else ""."""
    header = _header(path)
    metadata = header.get("__metadata__") or {}
    if isinstance(metadata, dict):
        named = " ".join(str(metadata.get(key, "")) for key in ARCHITECTURE_KEYS).lower()
        if "radiance" in named:  # whose name has Chroma's in it
            return "radiance"
        families = [family for family in FAMILIES if family in named]
        if len(families) == 1:
            return families[0]
    return "chroma" if any("distilled_guidance_layer" in key for key in header) else ""


def _header(path: Path) -> Mapping[str, Any]:
    try:
        return model_header_of(path)[0]
    except (OSError, ValueError):
        return {}  # reported where the file is read
