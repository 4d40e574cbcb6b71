"""CheckDataset: what is wrong with the images and captions of a dataset, as a text and a sheet of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from ...trainer_core.config.dataset import DatasetConfig
from ...trainer_core.config.model import ModelConfig
from ...trainer_core.host import Host, Notice
from ...trainer_core.spec import Doc, NodeSpec, Output, Socket


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


def run(inputs: Inputs, host: Host) -> tuple[str, list[Any]]:
    """Return the report and the sheet."""
    from ...trainer_core.dataset_doctor.examine_dataset import examine_dataset
    from ...trainer_core.dataset_doctor.findings import dataset_text
    from ...trainer_core.dataset_doctor.findings_sheet import draw_findings
    from ...trainer_core.dataset_doctor.token_limits import token_limit
    from ..lora_tools.check_lora import to_image

    report, images = examine_dataset(inputs.dataset, host, *token_limit(inputs.model, host.paths))
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
    is_output=True,
    search_aliases=("doctor", "duplicates", "blur", "watermark", "quality", "dataset"),
)
