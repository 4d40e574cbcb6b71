"""CheckLoRA: what a LoRA is, what is wrong with it, and how much rank it needs; repairs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from ...trainer_core.errors import Problem
from ...trainer_core.host import Host, Notice
from ...trainer_core.spec import Doc, NodeSpec, Output, Socket
from .lora_model import LORA_NAME, LoraModel, SaveAs, name_problems


@dataclass(frozen=True, kw_only=True)
class Inputs:
    lora_model: LoraModel
    second: Annotated[
        dict | None,
        Socket("LORA_MODEL"),
        Doc("Another LoRA: the report then also says how far both change the model in the same way."),
    ] = None
    save_as: SaveAs = ""

    def problems(self) -> list[Problem]:
        """Return what is wrong with the name of the file."""
        return name_problems(self.save_as)


def run(inputs: Inputs, host: Host) -> tuple[str, list[Any], Any, str]:
    """Return the report, its chart, the repaired LoRA (the same one if nothing needs a repair) and the saved name."""
    from ...trainer_core.lora_tools.progress import progress_of
    from ...trainer_core.lora_tools.reader import of_tensors
    from ...trainer_core.lora_tools.report.compare import compare
    from ...trainer_core.lora_tools.report.examine import examine
    from ...trainer_core.lora_tools.report.report_chart import draw_report
    from ...trainer_core.lora_tools.report.report_text import report_text

    lora = of_tensors(inputs.lora_model)
    report = examine(lora, progress_of(host, "reading the layers"))
    text = report_text(report)
    if inputs.second is not None:
        comparison = compare(lora, of_tensors(inputs.second, "second"), progress_of(host, "comparing both files"))
        text += f"\n\n{comparison.text()}"
    host.emit(Notice(text, "info" if report.is_sound else "warning", ascii=report_text(report, ascii_only=True)))
    tensors, saved = inputs.lora_model, ""
    if report.base.is_ours and (report.needs_repair or inputs.save_as.strip()):
        tensors, saved = _repair(inputs, lora, report, host)
    return text, [to_image(draw_report(report))], tensors, saved


def _repair(inputs: Inputs, lora: Any, report: Any, host: Host) -> tuple[Any, str]:
    from ...trainer_core.lora_tools.report.repair import metadata_of_repair, sound_layers
    from .lora_model import finish

    tensors, _, saved = finish(
        host, "repaired", lambda: sound_layers(lora, report), metadata_of_repair(lora, report), inputs.save_as
    )
    return tensors, saved


def to_image(image: Any) -> Any:
    """Return an image as ComfyUI has it, (1, H, W, 3) in [0, 1]."""
    import numpy
    import torch

    return torch.from_numpy(numpy.asarray(image.convert("RGB")).copy()).float().div(255)[None]


SPEC = NodeSpec(
    id="CheckLoRA",
    title="Check LoRA",
    category="ChromaTrainer/lora",
    description="Reports which tool and base model a LoRA is of, keys that do not load, wrong alphas, broken layers "
    "and unused rank, with a chart of the update by block; repairs what can be repaired.",
    inputs=Inputs,
    outputs=(
        Output("report", "STRING", "The report, for ComfyUI's Preview as Text node."),
        Output("chart", "IMAGE", "Size of the update in each block, and the rank that each layer needs.", is_list=True),
        Output("lora_model", "LORA_MODEL", "The repaired LoRA, or the same one if nothing needs a repair."),
        LORA_NAME,
    ),
    run=run,
    is_output=True,
    search_aliases=("doctor", "inspect", "repair", "analyze", "convert", "lora"),
)
