"""What a run writes about itself: report.json, the charts, and notices."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from ..config.request import TrainedLora
from ..devices import (
    peak_ram_bytes,
    peak_vram_bytes,
)
from ..flow.sigma_density import ShiftedBySize, density
from ..host import Host, Notice
from ..plots.density_chart import density_text, draw_density
from ..plots.image_grid import save_png
from ..plots.loss_chart import Marker, StepPoint, draw_loss_chart
from ..runs import layout
from .hooks.validation import LiveValidation
from .phase_timer import PhaseTimer
from .prepare import RunPlan
from .step.state import TrainState


def report_density(plan: RunPlan, record: Mapping[str, Any], prompt: Mapping[str, Any], host: Host) -> None:
    name, shift = plan.request.training.sigma_density, plan.request.training.shift
    shown = density(name, shift)
    if isinstance(shown, ShiftedBySize):  # told for the most common size
        buckets = plan.index.report["buckets"]
        width, height = map(int, max(buckets, key=lambda size: buckets[size]).split("x"))
        shift = round(shown.at(width * height // 64).shift, 3)
    told, ascii_told = (
        f"noise levels to be trained ({name}):\n{density_text(name, shift, ascii_only=plain)}"
        for plain in (False, True)
    )
    host.emit(Notice(told, ascii=ascii_told))
    if warning := shown.warning:
        host.emit(Notice(warning, "warning"))
    save_png(draw_density(name, shift), plan.folder / layout.DENSITY_CHART, record, prompt=prompt)


def warn_other_versions(folder: Path, record: Mapping[str, Any], host: Host) -> None:
    """Equal bytes are promised for equal versions only; a run that goes on with others says so."""
    try:
        before = json.loads((folder / layout.REQUEST).read_text("utf-8"))["versions"]
    except (OSError, ValueError, KeyError):
        return
    other = [
        f"{name} {before.get(name)} -> {now}" for name, now in record["versions"].items() if before.get(name) != now
    ]
    if other and layout.list_checkpoints(folder / layout.CHECKPOINTS):
        text = f"begun with other versions ({', '.join(other)}): it goes on, but not to the same bytes as one begun with these"
        host.emit(Notice(text, "warning"))


def draw_chart(plan: RunPlan, state: TrainState, record: Mapping[str, Any]) -> None:
    history = [
        StepPoint(i + 1, loss, rate)
        for i, (loss, rate) in enumerate(zip(state.losses, state.learning_rates, strict=True))
        if math.isfinite(loss)
    ]
    every = state.config.checkpoint_every
    markers = [Marker(step, "checkpoint") for step in range(every, state.step + 1, every)] if every else []
    chart = draw_loss_chart(history, markers, f"{state.config.name}: training loss")
    save_png(chart, plan.folder / layout.LOSS_CHART, record, prompt=record["workflow"])


def build_report(
    plan: RunPlan,
    state: TrainState,
    lora: TrainedLora,
    phases: PhaseTimer,
    evals: tuple[tuple[float, float], tuple[float, float]],
    first: int,
    live: LiveValidation,
) -> dict[str, Any]:
    seconds = phases.read()
    return {
        "lora": lora.path,
        "sha256": lora.sha256,
        "steps": state.step,
        "resumed_from": first,
        "loss": [loss if math.isfinite(loss) else None for loss in state.losses],
        "skipped_steps": sum(not math.isfinite(loss) for loss in state.losses),
        "eval_loss": {
            "before": evals[0][0],
            "after": evals[1][0],
            "standard_error": [evals[0][1], evals[1][1]],
            "images": "held out" if state.held else "trained on",
        },
        "seconds": seconds,
        # The median is the steady step: the first ones warm up, and saves fall between steps.
        "seconds_per_step": round(median(state.step_seconds), 5) if state.step_seconds else None,
        "peak_ram_bytes": peak_ram_bytes(),
        "peak_vram_bytes": peak_vram_bytes(state.device),
        "device": str(state.device),
        "dataset": plan.index.report,
        "files": {
            "run": str(plan.folder),
            "loss_chart": str(plan.folder / layout.LOSS_CHART),
            "crop_sheet": str(plan.folder / layout.CROP_SHEET),
            **({"pair_sheet": str(plan.folder / layout.PAIR_SHEET)} if plan.references else {}),
            "validation": [str(path) for path in live.last_grids],
        },
    }
