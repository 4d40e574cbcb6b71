"""CheckDataset: what is wrong with the images and captions of a dataset, as a text and a sheet of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from ...trainer_core.config.dataset import DatasetConfig
from ...trainer_core.config.model import ModelConfig
from ...trainer_core.errors import Problem
from ...trainer_core.host import Host, Notice, collect
from ...trainer_core.runs.control import find_run_by_name
from ...trainer_core.spec import Doc, NodeSpec, Output, Socket, Text


@dataclass(frozen=True, kw_only=True)
class Inputs:
    dataset: Annotated[
        DatasetConfig,
        Socket("TRAIN_DATASET"),
        Doc("The dataset, from DatasetBackend, which is checked at its resolution."),
    ]
    model: Annotated[
        ModelConfig | None,
        Socket("TRAIN_MODEL"),
        Doc("The base model, for the length that its text encoder allows captions to have. Loads no weights."),
    ] = None
    run: Annotated[
        str,
        Text(placeholder="not used"),
        Doc(
            "Name of a run that was trained on these images, or of its LoRA: images whose loss is far above that of the "
            "others are reported too. The run needs held-out images, and eval_images as many as there are."
        ),
    ] = ""


def preflight(inputs: Inputs, host: Host) -> list[Problem]:
    """Return a problem if there is no such run."""
    problems: list[Problem] = []
    if inputs.run.strip():
        collect(problems, find_run_by_name, inputs.run.strip(), host.paths.output)
    return problems


def run(inputs: Inputs, host: Host) -> tuple[str, list[Any]]:
    """Return the report and the sheet."""
    from ...trainer_core.dataset_doctor.examine_dataset import examine_dataset
    from ...trainer_core.dataset_doctor.findings import dataset_text
    from ...trainer_core.dataset_doctor.findings_sheet import draw_findings
    from ...trainer_core.dataset_doctor.token_limits import token_limit
    from ..lora_tools.check_lora import to_image

    folder = find_run_by_name(inputs.run.strip(), host.paths.output) if inputs.run.strip() else None
    report, images = examine_dataset(inputs.dataset, host, *token_limit(inputs.model, host.paths), folder)
    text = dataset_text(report)
    host.emit(Notice(text, "info" if report.is_sound else "warning"))
    return text, [to_image(draw_findings(report, images, host))]


SPEC = NodeSpec(
    id="CheckDataset",
    title="Check Dataset",
    category="ChromaTrainer",
    description="Looks for what spoils a dataset: nearly equal images, blurry, dark and small ones, watermarks, captions that are "
    "missing, equal or too long. Trains nothing and changes no file.",
    inputs=Inputs,
    outputs=(
        Output("report", "STRING", "The report, for ComfyUI's Preview as Text node."),
        Output("sheet", "IMAGE", "The images of each finding, with their numbers.", is_list=True),
    ),
    run=run,
    preflight=preflight,
    is_output=True,
    search_aliases=("doctor", "duplicates", "blur", "watermark", "quality", "dataset"),
)
