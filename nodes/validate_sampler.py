"""ValidateSampler: samples validation images."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from ..trainer_core.config.model import ModelConfig
from ..trainer_core.config.request import TrainedLora
from ..trainer_core.config.validation import ValidationConfig
from ..trainer_core.errors import Problem, UserError
from ..trainer_core.host import Host
from ..trainer_core.spec import Doc, NodeSpec, Output, Socket


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
    """Return the validation settings, with the reference image as an absolute path."""
    settings = ValidationConfig(**{field.name: getattr(inputs, field.name) for field in fields(ValidationConfig)})
    return (
        replace(settings, reference=_find_image(settings.reference, host)) if settings.reference.strip() else settings
    )


def _find_image(name: str, host: Host) -> str:
    """Return the absolute path of an image in an allowed folder."""
    folder, _, file = name.strip().replace("\\", "/").rpartition("/")
    path = host.paths.find_dataset(folder or ".", "reference") / file
    if not path.is_file():
        raise UserError.at("reference", f"{name!r} is not an image file; there is no {file!r} in {path.parent}")
    return str(path)


def preflight(inputs: Inputs, host: Host) -> list[Problem]:
    """Return a problem for each package that sampling needs and that is not installed."""
    from ..trainer_core.quant.packages import missing_for_drawing

    return missing_for_drawing(inputs)


def run(inputs: Inputs, host: Host) -> tuple[list[Any], ValidationConfig, list[Any], list[str]]:
    """Sample the images. Without a model or LoRA, return only the settings."""
    settings = settings_of(inputs, host)
    model = inputs.model or (inputs.lora.model if inputs.lora else None)
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
    is_output=True,
    search_aliases=("validation", "preview", "sample", "grid"),
)
