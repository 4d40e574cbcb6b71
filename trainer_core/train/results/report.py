"""Write report.json and the charts of a run, and log notices about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from ...config.request import TrainedLora
from ...config.training import EVAL_SIGMAS
from ...devices import (
    peak_ram_bytes,
    peak_vram_bytes,
)
from ...flow.sigma_density import ShiftedBySize, density
from ...host import Host, Notice
from ...plots.density_chart import density_text, draw_density
from ...plots.image_grid import save_png
from ...plots.loss_chart import Marker, StepPoint, draw_loss_chart
from ...runs import layout
from ...storage.bounded_files import read_json
from ..figures.leak import report_of
from ..figures.paired_evals import Estimate, verdict
from ..hooks.eval_loss import Eval
from ..hooks.validation import LiveValidation
from ..phase_timer import PhaseTimer
from ..prepare import RunPlan
from ..step.state import TrainState

RECORD_BYTES = 64 << 20  # of request.json, which holds the workflow


def report_density(plan: RunPlan, record: Mapping[str, Any], host: Host) -> None:
    """Log the distribution of the sigmas, and draw its chart."""
    name, shift = plan.request.training.sigma_density, plan.request.training.shift
    sigma_density = density(name, shift)
    if isinstance(sigma_density, ShiftedBySize):  # shown for the most common size
        buckets = plan.index.report["buckets"]
        width, height = map(int, max(buckets, key=lambda size: buckets[size]).split("x"))
        shift = round(sigma_density.at(width * height // plan.family.pixel_step**2).shift, 3)
    message, ascii_message = (
        f"noise levels (sigma) in training ({name}):\n{density_text(name, shift, ascii_only=plain)}"
        for plain in (False, True)
    )
    host.emit(Notice(message, ascii=ascii_message))
    if warning := sigma_density.warning:
        host.emit(Notice(warning, "warning"))
    save_png(draw_density(name, shift), plan.folder / layout.DENSITY_CHART, record, prompt=record["workflow"])


def warn_other_versions(folder: Path, record: Mapping[str, Any], host: Host) -> None:
    """Warn where a run is resumed with other package versions: equal bytes are guaranteed for equal versions only."""
    try:
        before = dict(read_json(folder / layout.REQUEST, RECORD_BYTES)["versions"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    other = [
        f"{name} {before.get(name)} -> {now}" for name, now in record["versions"].items() if before.get(name) != now
    ]
    if other and layout.list_checkpoints(folder / layout.CHECKPOINTS):
        text = (
            f"this run was started with other versions ({', '.join(other)}): it continues, but its bytes will differ "
            "from those of a run that was started with these versions"
        )
        host.emit(Notice(text, "warning"))


def draw_chart(plan: RunPlan, state: TrainState, record: Mapping[str, Any]) -> None:
    """Draw the chart of the training loss, with a marker at every checkpoint."""
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
    evals: tuple[Eval | None, Eval | None, Eval | None],
    first: int,
    live: LiveValidation,
) -> dict[str, Any]:
    """Return the values of report.json (docs/report.md).

    Args:
        evals: the eval loss and its standard error: of the base model, None where the run starts from it; before and
            after training, None where they were not measured.
        first: step that the run was resumed from, 0 for none.
    """
    seconds = phases.read()
    base, before, after = evals
    return {
        "lora": lora.path,
        "sha256": lora.sha256,
        "steps": state.step,
        "resumed_from": first,
        "loss": [loss if math.isfinite(loss) else None for loss in state.losses],
        "skipped_steps": sum(not math.isfinite(loss) for loss in state.losses),
        "eval_loss": {
            **({"base": base[0]} if base else {}),
            "before": before and before[0],
            "after": after and after[0],
            "standard_error": [before and before[1], after and after[1]],
            "images": "held out" if state.held else "trained on",
            **_comparison(state),
        },
        **({"leak": report_of(state.leaks)} if state.leaks else {}),
        **({"image_scores": live.scoring.report(state.step)} if live.scoring else {}),
        "stopped_early": state.stop_reason or None,
        "seconds": seconds,
        # The median measures a steady step: the first steps warm up, and saves happen between steps.
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


def _comparison(state: TrainState) -> dict[str, Any]:
    """Return what the evaluations say beside one another: the change since the start, and each with held-out images."""
    result = verdict(state.evaluations, state.step)
    if result is None:
        return {}
    values: dict[str, Any] = {"change": _estimate(result.improvement)}
    if state.held:
        values["evaluations"] = [_evaluation(state, step) for step in sorted(state.evaluations)]
    return values


def _evaluation(state: TrainState, step: int) -> dict[str, Any]:
    mean, error = state.evaluations[step].loss
    result = verdict(state.evaluations, step)
    values: dict[str, Any] = {"step": step, "loss": mean, "standard_error": error}
    if result:
        values |= {
            "trained": result.trained,
            "best": result.best,
            "change": _estimate(result.change),
            "gap_since": result.gap_since,
            "gap": result.gap and _estimate(result.gap),
            "gap_by_sigma": {
                f"{sigma:g}": _estimate(value) for sigma, value in zip(EVAL_SIGMAS, result.gaps, strict=False)
            },
            "overfits": result.overfits,
        }
    return values


def _estimate(value: Estimate) -> dict[str, float]:
    return {"mean": value[0], "standard_error": value[1]}
