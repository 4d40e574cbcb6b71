"""Find settings that contradict the model's files, from file headers alone, and a sampling model that the LoRA won't fit.

Needs no torch, but where a function says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.adapter import NO_LORA
from ..config.flux import FLAVOURS
from ..config.model import ModelConfig
from ..config.request import TrainRequest
from ..errors import Problem, UserError
from ..models.loading.config_file import read_config
from ..models.loading.header_check import GUIDANCE
from ..models.loading.locate import is_local
from ..quant.packages import missing_packages
from ..storage.model_header import model_header_of
from .tokenizer_files import is_checked_by_family, tokenizer_problems

if TYPE_CHECKING:  # so that checks of settings do not import torch
    import torch

    from ..models.family import Family

ARCHITECTURE_KEYS = ("modelspec.architecture", "ss_base_model_version", "ss_base_model")
SAMPLING_MODEL, NUM_SHOWN = "sampling_model", 3
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


def sampling_model_problems(request: TrainRequest) -> list[Problem]:
    """Return problems that the settings alone show. Needs no torch."""
    other, model = request.sampling_model, request.model
    if other is None:
        return []
    if request.adapter.is_full:
        text = (
            "is connected, but kind full trains the base model's own weights, so there is no LoRA that another model "
            "could be sampled with; disconnect it, or train a LoRA"
        )
        return [Problem(SAMPLING_MODEL, text)]
    if other.family != model.family:
        text = f"is {name_of(other)}, and {name_of(model)} is trained, whose LoRA does not fit it"
        return [Problem(SAMPLING_MODEL, f"{text}; connect a model of the family {model.family.title()}")]
    if other.takes_references != model.takes_references:
        which = "generates images from reference images" if other.takes_references else "takes no reference image"
        return [Problem(SAMPLING_MODEL, f"is {name_of(other)}, which {which}, other than the trained {name_of(model)}")]
    return [_named(problem) for problem in missing_packages(other.quantization)]


def sampling_model_file_problems(
    request: TrainRequest, family: Family, device: torch.device, needs_weights: bool
) -> list[Problem]:
    """Return problems of its files and of the device, and layers that differ from the trained model's.

    Imports torch. Headers are read, and no weights. Call it where sampling_model_problems finds nothing.
    """
    from ..quant.loading import quantization_problems

    other = request.sampling_model
    if other is None:
        return []
    problems = [*family.problems(other, needs_weights), *quantization_problems(other.quantization, device)]
    if not is_checked_by_family(other):
        problems += tokenizer_problems(other)
    return [_named(problem) for problem in problems]


def refuse_other_layers(request: TrainRequest, family: Family) -> None:
    """Check that the trained layers are in the sampling model too, with the same shapes. Imports torch.

    Raises:
        UserError: they are not.
    """
    from .attach_adapter import learning

    other = request.sampling_model
    if other is None:
        return
    trained, sampled = family.shared_transformer(request.model), family.shared_transformer(other)
    shapes, other_shapes = _shapes_of(trained), _shapes_of(sampled)
    names = learning(trained, family, request)
    differing = [name for name in names if shapes[name] != other_shapes.get(name)]
    if not differing:
        return
    examples = "; ".join(
        f"{name} is {_size(shapes[name])}, and {_size(other_shapes.get(name))} there" for name in differing[:NUM_SHOWN]
    )
    text = f"{name_of(other)} has other layers than {name_of(request.model)}, which is trained: {len(differing)} of "
    raise UserError.at(SAMPLING_MODEL, f"{text}{len(names)} trained layers differ, such as {examples}")


def name_of(model: ModelConfig) -> str:
    """Return a model's name for messages."""
    family = model.family.title()
    return family if model.flavour == model.family else f"{family} {model.flavour}"


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


def _shapes_of(transformer: torch.nn.Module) -> dict[str, tuple[int, int]]:
    import torch

    linears = ((name, part) for name, part in transformer.named_modules() if isinstance(part, torch.nn.Linear))
    return {name: (part.out_features, part.in_features) for name, part in linears}


def _size(shape: tuple[int, int] | None) -> str:
    return f"{shape[0]} x {shape[1]}" if shape else "missing"


def _named(problem: Problem) -> Problem:
    return Problem(SAMPLING_MODEL, f"its {problem.field}: {problem.message}")
