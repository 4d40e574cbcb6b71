"""ValidateSampler: samples validation images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from ..trainer_core.config.model import ModelConfig
from ..trainer_core.config.request import TrainedLora
from ..trainer_core.config.validation import TAEF1, ValidationConfig
from ..trainer_core.errors import Problem, UserError, quoted
from ..trainer_core.host import Host, Paths, collect
from ..trainer_core.paths import find_taef1
from ..trainer_core.spec import Doc, NodeSpec, Output, Socket
from ..trainer_core.validation.scores.score_model import score_problems, with_score_folder
from .lora_trainer import trains_model

MAX_LIBRARY_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Inputs(ValidationConfig):
    model: Annotated[
        ModelConfig | None,
        Socket("TRAIN_MODEL"),
        Doc(
            "Model to sample with. If neither a model nor a LoRA is connected, this node samples no images; connect "
            "`validation` to LoRATrainer to sample during training."
        ),
    ] = None
    lora: Annotated[
        TrainedLora | None,
        Socket("TRAINED_LORA"),
        Doc(
            "Trained LoRA to sample with, next to the base model. Uses the LoRA's base model, unless a model is "
            "connected."
        ),
    ] = None


def settings_of(inputs: Inputs, host: Host) -> ValidationConfig:
    """Return the validation settings, with the reference image as an absolute path and the prompts of a library's file.

    Raises:
        UserError: The reference image or the prompt library does not exist, or the library is invalid.
    """
    settings = ValidationConfig(**{field.name: getattr(inputs, field.name) for field in fields(ValidationConfig)})
    problems: list[Problem] = []
    if settings.reference.strip():
        path = collect(problems, _find_file, settings.reference, "reference", "an image file", host.paths)
        settings = replace(settings, reference=str(path))
    if isinstance(changed := collect(problems, with_score_folder, settings, host.paths), ValidationConfig):
        settings = changed
    if settings.library_file:
        settings = replace(settings, prompts=collect(problems, _read_library, settings.library_file, host.paths) or "")
    if problems:
        raise UserError(problems)
    return settings


def _find_file(name: str, field: str, what: str, paths: Paths) -> Path:
    """Return the absolute path of a file in an allowed folder."""
    folder, _, file = name.strip().strip('"').replace("\\", "/").rpartition("/")
    path = paths.find_dataset(folder or ("/" if name.startswith("/") else "."), field) / file
    if not path.is_file():
        raise UserError.at(field, f"{quoted(name)} is not {what}; there is no {quoted(file)} in {path.parent}")
    return path


def _read_library(name: str, paths: Paths) -> str:
    """Return the text of a prompt library, which has been checked."""
    path = _find_file(name, "prompts", "a prompt library", paths)
    try:
        if path.stat().st_size > MAX_LIBRARY_BYTES:
            raise UserError.at(
                "prompts", f"{quoted(name)} has more than {MAX_LIBRARY_BYTES >> 20} MiB; it is no prompt library"
            )
        text = path.read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError.at(
            "prompts", f"{quoted(name)} is not valid UTF-8 (at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserError.at("prompts", f"{quoted(name)} can't be read: {error.strerror or error}") from error
    if not text.startswith("{"):
        message = f"{quoted(name)} is not a prompt library; it must be a JSON object of names and prompts"
        raise UserError.at("prompts", message)
    try:
        ValidationConfig(prompts=text).library()
    except UserError as error:
        raise UserError(Problem(p.field, f"{quoted(name)} {p.message}") for p in error.problems) from error
    return text


def fingerprint(values: Mapping[str, Any], paths: Paths) -> str:
    """Return a text that changes when the file of a prompt library is edited, "" without one."""
    settings = ValidationConfig(prompts=str(values.get("prompts") or ""))
    try:
        return _read_library(settings.library_file, paths) if settings.library_file else ""
    except UserError as error:
        return str(error)


def preflight(inputs: Inputs, host: Host) -> list[Problem]:
    """Return problems of the files that the settings name, and one for each missing package that sampling needs."""
    from ..trainer_core.quant.packages import missing_for_drawing

    problems = missing_for_drawing(inputs)
    if isinstance(settings := collect(problems, settings_of, inputs, host), ValidationConfig):
        problems += score_problems(settings)
    if inputs.previews == TAEF1:
        collect(problems, find_taef1, host.paths)
    return problems


def accepts(inputs: Inputs, sources: Mapping[str, Any]) -> list[Problem]:
    """Return the settings that a whole model can't have, where kind full will train one."""
    trainer = sources.get("lora")
    return inputs.problems_of_model("the output of kind full") if trains_model(trainer) else []


def run(inputs: Inputs, host: Host) -> tuple[list[Any], ValidationConfig, list[Any], list[str]]:
    """Sample the images. Without a model or LoRA, return only the settings."""
    settings = settings_of(inputs, host)
    model = inputs.model or (inputs.lora and (inputs.sampling_model or inputs.lora.model))
    if model is None:
        return [], settings, [], []
    from ..trainer_core.validation.render import draw

    result = draw(settings, model, inputs.lora, host)
    return result.grids, settings, result.pictures, result.labels


SPEC = NodeSpec(
    id="ValidateSampler",
    title="Validate Sampler",
    category="ChromaTrainer",
    description="Samples images with the base model and with a trained LoRA, with the same sampling as ComfyUI.",
    inputs=Inputs,
    outputs=(
        Output(
            "images",
            "IMAGE",
            "Labeled image grids, one per resolution: the base model first, then each LoRA strength or each "
            "checkpoint.",
            is_list=True,
        ),
        Output("validation", "VALIDATION", "These settings, for LoRATrainer to sample during training."),
        Output("pictures", "IMAGE", "The images of the grids, one by one.", is_list=True),
        Output("labels", "STRING", "Label of each image in pictures, such as base, cat face, 64x64.", is_list=True),
    ),
    run=run,
    preflight=preflight,
    accepts=accepts,
    fingerprint=fingerprint,
    is_output=True,
    search_aliases=("validation", "preview", "sample", "grid"),
)
