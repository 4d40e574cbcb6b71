"""The one entrance: a request in, a LoRA file out. ComfyUI's node and the CLI both call run()."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..config.request import TrainedLora, TrainRequest
from ..devices import empty_cache, peak_ram_bytes, peak_vram_bytes
from ..files import write_json
from ..host import Host, LoraSaved, Notice, PhaseStarted, RunReported
from ..lora.export import export_lora
from ..lora.inject import set_strength_
from ..problems import UserError
from ..validation.grid import save_png
from .build import Plan, build_run, plan_run
from .chart import Marker, StepPoint, density_text, draw_density, draw_loss_chart
from .checkpoint import checkpoint_hook, newest_intact, restore_, save_checkpoint
from .evaluation import eval_loss
from .live import LiveValidation
from .loop import Run, fit
from .phases import Phases
from .record import lora_metadata, run_record


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves: the LoRA, the loss of every step, and the report (docs/report.md)."""

    lora: TrainedLora
    losses: tuple[float, ...]
    report: dict[str, Any]


def run(request: TrainRequest, host: Host, prompt: Mapping[str, Any] | None = None) -> TrainResult:
    """Train a LoRA.

    Args:
        prompt: the workflow that asks for it, in ComfyUI's API form; recorded in every file that is written.
    Raises:
        UserError: every problem that can be seen beforehand; or one met on the way.
        Cancelled (or the host's own interrupt): a checkpoint and a usable LoRA of the steps done are on disk.
    """
    # ComfyUI runs nodes in inference mode, in which no gradient can be computed.
    with torch.inference_mode(False), torch.enable_grad():
        try:
            return _run(request, host, prompt or {})
        except OSError as error:
            if error.errno is None:  # not the system's: a library's own fault
                raise
            where = str(error.filename or host.paths.output)
            remedy = "what was saved before is intact; make room or mend the path, and run again to go on"
            raise UserError.at(where, f"{error.strerror}; {remedy}") from error


def _run(request: TrainRequest, host: Host, prompt: Mapping[str, Any]) -> TrainResult:
    phases = Phases()
    host.emit(PhaseStarted("start"))
    plan = plan_run(request, host)
    run = build_run(plan, host, phases)
    record = run_record(plan, prompt)
    write_json(plan.folder / "request.json", record)
    host.emit(
        Notice(
            f"noise levels to be trained ({request.training.sigma_density}):\n{density_text(request.training.sigma_density, request.training.shift)}"
        )
    )
    density = draw_density(request.training.sigma_density, request.training.shift)
    save_png(density, plan.folder / "density.png", record, prompt=prompt)

    with phases("load"):
        live = LiveValidation.build(plan, run, host, record, phases)
    with phases("validate"):
        set_strength_(run.transformer, 0.0)
        eval_before = eval_loss(run)
        live.draw_base(run)
        set_strength_(run.transformer, 1.0)

    checkpoints = plan.folder / "checkpoints"
    newest = newest_intact(checkpoints, host, run.num_steps) if request.training.resume else None
    if newest:
        restore_(run, newest)
        host.emit(Notice(f"resumed from step {run.step} of {run.num_steps}"))
    first = run.step
    hooks = (
        checkpoint_hook(checkpoints, request.training.checkpoint_every, request.training.keep_checkpoints, host),
        live.hook,
    )
    try:
        with phases("train"):
            host.emit(PhaseStarted("train", run.num_steps, "steps"))
            fit(run, host, hooks)
    except KeyboardInterrupt:  # it may have come in the middle of a step: the state on disk is the last that is whole
        raise
    except BaseException:  # ComfyUI's interrupt is a BaseException; whatever ended it, what was learnt is kept
        _keep(plan, run, checkpoints, record, host)
        raise
    with phases("save"):  # before the pictures: whatever ends those, the LoRA is there
        host.emit(PhaseStarted("save"))
        save_checkpoint(checkpoints, run, request.training.keep_checkpoints, host)
        lora = _save(plan, run, record, host)
    with phases("validate"):
        eval_after = eval_loss(run)
        live.draw_last(run)
    report = _report(plan, run, lora, phases, (eval_before, eval_after), first, live)
    write_json(plan.folder / "report.json", report)
    host.emit(RunReported(report))
    result = TrainResult(lora, tuple(run.losses), report)
    device = run.device
    del run, live, hooks
    gc.collect()
    empty_cache(device)
    return result


def _save(plan: Plan, run: Run, record: Mapping[str, Any], host: Host) -> TrainedLora:
    path = host.paths.output / "loras" / f"{run.config.name}.safetensors"
    saved = export_lora(run.layers, run.transformer, path, lora_metadata(plan, run, record))
    host.emit(LoraSaved(path, saved.sha256, saved.applied, saved.num_keys))
    _draw_chart(plan, run, record)
    return TrainedLora(str(path), path.name, saved.sha256, plan.request.model)


def _keep(plan: Plan, run: Run, checkpoints: Path, record: Mapping[str, Any], host: Host) -> None:
    """After a cancel or a fault between two steps: a checkpoint to resume from, and the LoRA as it is."""
    if run.step == 0:
        return
    save_checkpoint(checkpoints, run, run.config.keep_checkpoints, host)
    _save(plan, run, record, host)
    host.emit(Notice(f"ended at step {run.step} of {run.num_steps}; run it again to go on from there", "warning"))


def _draw_chart(plan: Plan, run: Run, record: Mapping[str, Any]) -> None:
    history = [
        StepPoint(i + 1, loss, rate) for i, (loss, rate) in enumerate(zip(run.losses, run.learning_rates, strict=True))
    ]
    every = run.config.checkpoint_every
    markers = [Marker(step, "checkpoint") for step in range(every, run.step + 1, every)] if every else []
    chart = draw_loss_chart(history, markers, f"{run.config.name}: training loss")
    save_png(chart, plan.folder / "loss.png", record, prompt=record["workflow"])


def _report(
    plan: Plan,
    run: Run,
    lora: TrainedLora,
    phases: Phases,
    evals: tuple[float, float],
    first: int,
    live: LiveValidation,
) -> dict[str, Any]:
    seconds = phases.read()
    return {
        "lora": lora.path,
        "sha256": lora.sha256,
        "steps": run.step,
        "resumed_from": first,
        "loss": run.losses,
        "eval_loss": {"before": evals[0], "after": evals[1]},
        "seconds": seconds,
        # The median is the steady step: the first ones warm up, and saves fall between steps.
        "seconds_per_step": round(median(run.step_seconds), 5) if run.step_seconds else None,
        "peak_ram_bytes": peak_ram_bytes(),
        "peak_vram_bytes": peak_vram_bytes(run.device),
        "device": str(run.device),
        "dataset": plan.index.report,
        "files": {
            "run": str(plan.folder),
            "loss_chart": str(plan.folder / "loss.png"),
            "crop_sheet": str(plan.folder / "crops.png"),
            "validation": [str(path) for path in live.last_grids],
        },
    }
