"""ValidateSampler: pictures that show what was learnt."""

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
            "Draw with this model. With neither a model nor a LoRA connected nothing is drawn here: connect `validation` to LoRATrainer."
        ),
    ] = None
    lora: Annotated[
        TrainedLora | None,
        Socket("TRAINED_LORA"),
        Doc(
            "A trained LoRA; it brings its base model, unless another is connected. Its pictures stand beside the base model's."
        ),
    ] = None


def settings_of(inputs: Inputs, host: Host) -> ValidationConfig:
    settings = ValidationConfig(**{field.name: getattr(inputs, field.name) for field in fields(ValidationConfig)})
    return replace(settings, reference=_picture(settings.reference, host)) if settings.reference.strip() else settings


def _picture(name: str, host: Host) -> str:
    """The picture's path: in a folder that may be read."""
    folder, _, file = name.strip().replace("\\", "/").rpartition("/")
    path = host.paths.find_dataset(folder or ".", "reference") / file
    if not path.is_file():
        raise UserError.at("reference", f"{name!r} is no picture; there is no {file!r} in {path.parent}")
    return str(path)


def preflight(inputs: Inputs, host: Host) -> list[Problem]:
    from ..trainer_core.quant.packages import missing_for_drawing

    return missing_for_drawing(inputs)


def run(inputs: Inputs, host: Host) -> tuple[list[Any], ValidationConfig, list[Any], list[str]]:
    settings = settings_of(inputs, host)
    model = inputs.model or (inputs.lora.model if inputs.lora else None)
    if model is None:
        return [], settings, [], []
    from ..trainer_core.validation.render import draw

    found = draw(settings, model, inputs.lora, host)
    return found.grids, settings, found.pictures, found.labels


SPEC = NodeSpec(
    id="ValidateSampler",
    title="Validate Sampler",
    category="ChromaTrainer",
    description="Draws prompts with the base model and with a trained LoRA, sampled as ComfyUI samples.",
    inputs=Inputs,
    outputs=(
        Output(
            "images",
            "IMAGE",
            "The labelled grids, one a resolution: base first, then each strength of the LoRA, or each checkpoint.",
            is_list=True,
        ),
        Output("validation", "VALIDATION", "These settings, for LoRATrainer to draw while it trains."),
        Output("pictures", "IMAGE", "Every picture by itself.", is_list=True),
        Output("labels", "STRING", "What each of the pictures shows, such as base, cat face, 64x64.", is_list=True),
    ),
    run=run,
    preflight=preflight,
    is_output=True,
    search_aliases=("validation", "preview", "sample", "grid"),
)
