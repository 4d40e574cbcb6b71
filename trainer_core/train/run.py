"""The one entrance: a request in, a LoRA file out. ComfyUI's node and the CLI both call run()."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..adapters.files.export import ExportedLora, export_lora
from ..adapters.inject import set_strength_
from ..config.request import TrainedLora, TrainRequest
from ..data.dataset import Unreadable
from ..devices import as_current, empty_cache, empty_pinned, peak_ram_bytes, peak_vram_bytes, pick_device, reset_peak
from ..errors import UserError
from ..flow.sigma_density import ShiftedBySize, density
from ..host import EvalReport, Host, LoraSaved, MemoryPlanned, Notice, PhaseStarted, RunOpened, RunReported
from ..models.loading.weights import DTYPES
from ..planner.memory_plan import MemoryPlan
from ..plots.image_grid import save_png
from ..plots.loss_chart import Marker, StepPoint, density_text, draw_density, draw_loss_chart
from ..runs.event_log import Paused, RunHost, open_run, wait_for_resume
from ..runs.manifest import adopt, write_world
from ..setup.attach_adapter import look_at_data_
from ..storage.atomic import write_json
from .build import Plan, build_run, plan_run
from .hooks.checkpoint import newest_intact, restore_, step_name, weights_of
from .hooks.checkpointer import checkpoint_hook, keep
from .hooks.eval_loss import best_step, eval_loss
from .hooks.eval_weights import final_weights
from .hooks.trackers import tracked
from .hooks.validation import LiveValidation
from .memory_report import comparison, memory_report, memory_told
from .metadata import lora_metadata, run_record
from .phase_timer import Phases
from .planning import settled
from .step.loop import Run, fit


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
        while True:
            try:
                return _run(request, host, prompt or {})
            except Paused as pause:
                if not host.waits_when_paused:
                    raise
                folder = pause.folder
            except OSError as error:
                if error.errno is None:  # not the system's: a library's own fault
                    raise
                where = str(error.filename or host.paths.output)
                remedy = "what was saved before is intact; make room or mend the path, and run again to go on"
                raise UserError.at(where, f"{error.strerror}; {remedy}") from error
            _give_back(pick_device(host.device))  # the exception is gone, and with it all that its frames held
            wait_for_resume(folder, host)


def _run(request: TrainRequest, host: Host, prompt: Mapping[str, Any]) -> TrainResult:
    phases = Phases()
    host.emit(PhaseStarted("start"))
    unreadable: dict[str, str] = {}
    while True:
        checked = plan_run(request, host, unreadable)
        host.free_memory()  # what other models hold is free for this run
        reset_peak(checked.device)
        plan, forecast = settled(checked, host)
        try:
            with (
                as_current(plan.device), memory_told(forecast, phases, plan.device),
                open_run(plan.folder, host) as opened, tracked(plan, prompt, opened) as run_host,
            ):  # fmt: skip
                return _train(plan, run_host, prompt, phases, forecast)
        except Unreadable as found:  # without them it is another run, in another folder
            unreadable |= found.faults
        if not (plan.folder / "checkpoints").is_dir():
            shutil.rmtree(plan.folder, ignore_errors=True)


def _train(plan: Plan, host: RunHost, prompt: Mapping[str, Any], phases: Phases, forecast: MemoryPlan | None) -> TrainResult:
    request = plan.request
    host.emit(RunOpened(plan.folder))
    if forecast:
        on_device = forecast.device_peak if forecast.machine.device_bytes else 0
        host.emit(MemoryPlanned(on_device, forecast.ram_peak))
    if plan.adoption:
        adopt(plan.adoption, plan.folder, host)
    record = run_record(plan, prompt)
    _tell_other_versions(plan.folder, record, host)
    write_json(plan.folder / "request.json", record)
    write_world(plan.folder, plan.world)
    run = build_run(plan, host, phases)
    _tell_density(plan, record, prompt, host)

    with phases("load"):
        live = LiveValidation.build(plan, run, host, record, phases)
    with phases("validate"):
        set_strength_(run.transformer, 0.0)
        eval_before = eval_loss(run)
        host.emit(EvalReport(0, *eval_before, held_out=bool(run.held)))
        live.draw_base(run)
        set_strength_(run.transformer, 1.0)

    checkpoints = plan.folder / "checkpoints"
    newest = newest_intact(checkpoints, host, run.num_steps) if request.training.resume else None
    if newest:
        restore_(run, newest)
        host.emit(Notice(f"resumed from step {run.step} of {run.num_steps}"))
        live.catch_up(run)
    else:
        look_at_data_(run, request, host)
    first = run.step
    host.begin(first, run.num_steps, run.losses)
    try:
        with phases("train"):
            host.emit(PhaseStarted("train", run.num_steps, "steps"))
            fit(run, host, (checkpoint_hook(checkpoints, host, phases), live.hook))
    except KeyboardInterrupt:  # it may have come in the middle of a step: the state on disk is the last that is whole
        raise
    except BaseException:  # ComfyUI's interrupt is a BaseException; whatever ended it, what was learnt is kept
        _keep(plan, run, checkpoints, record, host)
        raise
    with phases("save"):  # before the pictures: whatever ends those, the LoRA is there
        host.emit(PhaseStarted("save"))
        keep(checkpoints, run, host)
        lora = _save(plan, run, record, host)
        best = _save_best(plan, run, checkpoints, record, host)
    with phases("validate"):
        eval_after = eval_loss(run)
        host.emit(EvalReport(run.step, *eval_after, held_out=bool(run.held)))
        live.draw_last(run)
    report = _report(plan, run, lora, phases, (eval_before, eval_after), first, live) | {"best": best}
    report["memory"] = memory_report(forecast, plan.device)
    host.emit(Notice(comparison(report["memory"])))
    write_json(plan.folder / "report.json", report)
    host.emit(RunReported(report))
    result = TrainResult(lora, tuple(run.losses), report)
    device = run.device
    del run, live
    _give_back(device)
    return result


def _give_back(device: torch.device) -> None:
    """All memory that nothing refers to."""
    gc.collect()
    empty_cache(device)
    empty_pinned(device)


def _tell_density(plan: Plan, record: Mapping[str, Any], prompt: Mapping[str, Any], host: Host) -> None:
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
    save_png(draw_density(name, shift), plan.folder / "density.png", record, prompt=prompt)


def _tell_other_versions(folder: Path, record: Mapping[str, Any], host: Host) -> None:
    """Equal bytes are promised for equal versions only; a run that goes on with others says so."""
    try:
        before = json.loads((folder / "request.json").read_text("utf-8"))["versions"]
    except (OSError, ValueError, KeyError):
        return
    other = [f"{name} {before.get(name)} -> {now}" for name, now in record["versions"].items() if before.get(name) != now]
    if other and any((folder / "checkpoints").glob("step-*")):
        text = f"begun with other versions ({', '.join(other)}): it goes on, but not to the same bytes as one begun with these"
        host.emit(Notice(text, "warning"))


def _export(plan: Plan, run: Run, path: Path, metadata: Mapping[str, str], host: Host) -> ExportedLora:
    """In the wanted precision; in fp32 where its rounding would change what the LoRA does (fp16 knows no numbers below 6e-8)."""
    config = plan.request.adapter

    def write(precision: str) -> ExportedLora:
        dtype = DTYPES[precision]
        return export_lora(run.layers, run.transformer, path, metadata, dtype, config.format, staging=plan.folder)

    try:
        return write(config.precision)
    except RuntimeError as error:
        if config.precision == "fp32":
            raise
        host.emit(Notice(f"{path.name} is written in fp32, because {config.precision} would change it ({error})", "warning"))
        return write("fp32")


def _save(plan: Plan, run: Run, record: Mapping[str, Any], host: Host) -> TrainedLora:
    path = host.paths.output / "loras" / f"{run.config.name}.safetensors"
    with final_weights(run):
        saved = _export(plan, run, path, lora_metadata(plan, run, record), host)
    host.emit(LoraSaved(path, saved.sha256, saved.applied, saved.num_keys))
    _draw_chart(plan, run, record)
    return TrainedLora(str(path), path.name, saved.sha256, plan.request.model, str(plan.folder))


def _save_best(
    plan: Plan, run: Run, checkpoints: Path, record: Mapping[str, Any], host: Host
) -> dict[str, Any] | None:
    """Save the LoRA of the checkpoint with the lowest loss on held-out images as NAME-best. None: none are held out."""
    step = best_step(run)
    if step is None:
        return None
    mean, error = run.eval_losses[step]
    found = {"step": step, "eval_loss": mean, "standard_error": error}
    host.emit(Notice(f"best on held-out images: step {step}, loss {mean:.4f} +- {error:.4f}"))
    path = host.paths.output / "loras" / f"{run.config.name}-best.safetensors"
    with weights_of(run, checkpoints / step_name(step)):
        metadata = {**lora_metadata(plan, run, record), "ss_steps": str(step)}
        saved = _export(plan, run, path, metadata, host)
    host.emit(LoraSaved(path, saved.sha256, saved.applied, saved.num_keys))
    return {**found, "lora": str(path), "sha256": saved.sha256}


def _keep(plan: Plan, run: Run, checkpoints: Path, record: Mapping[str, Any], host: Host) -> None:
    """After a cancel or a fault between two steps: a checkpoint to resume from, and the LoRA as it is.

    A fault on the way is told, and does not hide the one that ended the run.
    """
    if run.step == 0:
        return
    try:
        keep(checkpoints, run, host, evaluate=False)
        _save(plan, run, record, host)
    except (OSError, UserError, RuntimeError) as error:
        host.emit(Notice(f"the state of step {run.step} could not be kept: {error}", "warning"))
        return
    host.emit(Notice(f"ended at step {run.step} of {run.num_steps}; run it again to go on from there", "warning"))


def _draw_chart(plan: Plan, run: Run, record: Mapping[str, Any]) -> None:
    history = [
        StepPoint(i + 1, loss, rate)
        for i, (loss, rate) in enumerate(zip(run.losses, run.learning_rates, strict=True))
        if math.isfinite(loss)
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
    evals: tuple[tuple[float, float], tuple[float, float]],
    first: int,
    live: LiveValidation,
) -> dict[str, Any]:
    seconds = phases.read()
    return {
        "lora": lora.path,
        "sha256": lora.sha256,
        "steps": run.step,
        "resumed_from": first,
        "loss": [loss if math.isfinite(loss) else None for loss in run.losses],
        "skipped_steps": sum(not math.isfinite(loss) for loss in run.losses),
        "eval_loss": {
            "before": evals[0][0], "after": evals[1][0], "standard_error": [evals[0][1], evals[1][1]],
            "images": "held out" if run.held else "trained on",
        },
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
            **({"pair_sheet": str(plan.folder / "pairs.png")} if plan.references else {}),
            "validation": [str(path) for path in live.last_grids],
        },
    }
