"""The entry point of training: a request in, a LoRA file out. ComfyUI's node and the CLI both call run()."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.request import TrainedLora, TrainRequest
from ..data.dataset import Unreadable
from ..devices import (
    as_current,
    empty_cache,
    empty_pinned,
    pick_device,
    reset_peak,
    trim_heap,
)
from ..distributed.process_group import join, leave_own
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..host import Host, MemoryPlanned, Notice, PhaseStarted, RunOpened, RunReported
from ..launch.job import Result
from ..launch.launch import devices_to_start, launch
from ..planner.memory_plan import MemoryPlan
from ..runs import layout
from ..runs.local_values import write_launch_values, write_local_values
from ..runs.manifest import write_manifest
from ..runs.rank_host import PeerHost, host_of_rank, show_warnings
from ..runs.run_host import Paused, RunHost, open_run, wait_for_resume
from ..setup.attach_adapter import starts_beside_base
from ..storage.atomic import write_json
from .build import build_run
from .disk_space import refuse_full_disk
from .eva_init import init_from_data_
from .hooks.checkpoint import Load, adopt, continue_, load_weights_, newest_intact, restore_
from .hooks.checkpointer import catch_up, checkpoint_hook, save_and_prune
from .hooks.compare_ranks import checkpoint_for, compare_hook, share_start_
from .hooks.eval_loss import evaluate, evaluate_start
from .hooks.score_images import ImageScoring
from .hooks.trackers import track_run
from .hooks.validation import LiveValidation
from .memory_report import comparison, explain_oom, memory_report
from .phase_timer import PhaseTimer
from .plan_together import memory_with, plan_with, reporting_failure, require_shared_folder, warn_other_devices
from .prepare import RunPlan
from .results.metadata import make_record
from .results.report import build_report, report_density, warn_other_versions
from .results.save_lora import save_best_lora, save_lora
from .results.save_model import help_to_save
from .step.loop import fit
from .step.state import Judge, TrainState


@dataclass(frozen=True)
class TrainResult:
    """The result of a run."""

    lora: TrainedLora
    losses: tuple[float, ...]  # one per step
    report: dict[str, Any]  # see docs/report.md


def run(
    request: TrainRequest, host: Host, prompt: Mapping[str, Any] | None = None, judge: Judge | None = None
) -> TrainResult:
    """Train a LoRA.

    Args:
        prompt: the workflow of the run in ComfyUI's API format. It is recorded in every file that is written.
        judge: may end the run at a checkpoint. It is called in this process, so not where `devices` starts others.
    Raises:
        UserError: all problems that can be found in advance, or one that occurs during the run.
        Cancelled (or the host's own interrupt): a checkpoint and a usable LoRA of the completed steps are on disk.
    """
    devices = devices_to_start(request, host)
    ranks = join()
    host = host_of_rank(host, ranks)
    # ComfyUI runs nodes in inference mode, in which no gradient can be computed.
    with torch.inference_mode(False), torch.enable_grad(), reporting_failure(ranks):
        while True:
            try:
                if devices:
                    return _result_of(launch(request, host, prompt or {}, devices), request)
                return _run(request, host, prompt or {}, ranks, judge)
            except Paused as pause:
                if not host.waits_when_paused:
                    raise
                folder = pause.folder
            except OSError as error:
                if error.errno is None:  # raised by a library, not by the operating system
                    raise
                where = str(error.filename or host.paths.output)
                suggestion = "earlier files are intact; free disk space or fix the path, and run again to resume"
                raise UserError.at(where, f"{error.strerror}; {suggestion}") from error
            finally:
                leave_own()
            # After the except block: the exception no longer references the frames and their tensors.
            _free_memory(pick_device(host.device))
            wait_for_resume(folder, host)


def _result_of(result: Result, request: TrainRequest) -> TrainResult:
    path, name, sha256, folder = result.lora
    lora = TrainedLora(path, name, sha256, request.model, folder, request.adapter.is_full)
    return TrainResult(lora, result.losses, result.report)


def _run(
    request: TrainRequest, host: Host, prompt: Mapping[str, Any], ranks: Ranks, judge: Judge | None = None
) -> TrainResult:
    phases = PhaseTimer()
    host.emit(PhaseStarted("start"))
    unreadable: dict[str, str] = {}
    while True:
        checked = plan_with(ranks, request, host, unreadable)
        host.free_memory()  # unload other models, so that their memory is available to this run
        reset_peak(checked.device)
        plan, estimate = memory_with(ranks, checked, host)
        refuse_full_disk(plan, estimate)
        try:
            with (
                as_current(plan.device), explain_oom(estimate, phases, plan.device),
                _opened(plan, host, prompt, ranks) as run_host,
            ):  # fmt: skip
                return _train(plan, run_host, prompt, phases, estimate, ranks, judge)
        except Unreadable as error:  # without these images it is another run, in another folder
            unreadable |= error.faults
        if ranks.is_main and not layout.has_checkpoints(plan.folder):
            shutil.rmtree(plan.folder, ignore_errors=True)


@contextmanager
def _opened(plan: RunPlan, host: Host, prompt: Mapping[str, Any], ranks: Ranks) -> Iterator[RunHost | PeerHost]:
    """Yield the host of the run. Only rank 0 opens the run's folder and its trackers."""
    if isinstance(host, PeerHost):
        yield host
        return
    with open_run(plan.folder, host) as opened, track_run(plan, prompt, opened) as run_host:
        yield run_host
        show_warnings(run_host, ranks)


def _train(
    plan: RunPlan,
    host: RunHost | PeerHost,
    prompt: Mapping[str, Any],
    phases: PhaseTimer,
    estimate: MemoryPlan | None,
    ranks: Ranks,
    judge: Judge | None = None,
) -> TrainResult:
    request, ranks.ends_together = plan.request, False
    record = make_record(plan, prompt, host.paths)
    _announce(plan, estimate, host, ranks)
    if ranks.is_main:
        _begin_folder(plan, record, prompt, host)
    require_shared_folder(plan, ranks)
    scoring = ImageScoring.build(plan, record, ranks, host, phases)  # before the model takes the memory
    state = build_run(plan, host, phases, ranks, judge)
    if ranks.is_main:
        report_density(plan, record, host)

    with phases("load"):
        live = LiveValidation.build(plan, state, host, record, phases, scoring, estimate)
        live.set_damaged_aside(ranks)
    with phases("eval"):
        eval_before, eval_base = evaluate_start(state, host, starts_beside_base(request))
    with phases("validate"):
        live.sample_base(state)

    checkpoints = plan.folder / layout.CHECKPOINTS
    _resume_or_start_(state, request, checkpoints, live, host, phases)
    first = state.step
    host.begin(first, state.num_steps, state.losses)
    try:
        with phases("train"):
            host.emit(PhaseStarted("train", state.num_steps, "steps"))
            fit(state, host, (compare_hook(checkpoints, host), checkpoint_hook(checkpoints, host, phases), live.hook))
        with phases("save"):  # before the validation images, so that the LoRA exists if those fail
            host.emit(PhaseStarted("save"))
            save_and_prune(checkpoints, state, host)
    except BaseException:  # ComfyUI's interrupt is a BaseException; save the trained weights whatever ended the run
        if ranks.is_main or state.sharding:
            _save_unfinished(plan, state, checkpoints, record, host)
        raise
    lora, best = _save_results(plan, state, checkpoints, record, host, phases)
    with phases("eval"):
        eval_after = evaluate(state, host)
    with phases("validate"):
        live.sample_last(state)
    ranks.collect_warnings()
    report: dict[str, Any] = {}
    if lora:
        report = build_report(plan, state, lora, phases, (eval_base, eval_before, eval_after), first, live)
        report |= {"best": best, "memory": memory_report(estimate, plan.device)}
        host.emit(Notice(comparison(report["memory"])))
        write_json(plan.folder / layout.REPORT, report)
        host.emit(RunReported(report))
    result = TrainResult(_lora_of_main(plan, lora, ranks), tuple(state.losses), report)
    del state, live
    _free_memory(plan.device)
    return result


def _save_results(
    plan: RunPlan, state: TrainState, checkpoints: Path, record: Mapping[str, Any], host: Host, phases: PhaseTimer
) -> tuple[TrainedLora | None, dict[str, Any] | None]:
    """Save the LoRA, or the model, and that of the best checkpoint. Only rank 0 has them."""
    with phases("save"):
        if state.ranks.is_main:
            lora = save_lora(plan, state, record, host)
            return lora, save_best_lora(plan, state, checkpoints, record, host)
        if state.sharding:
            help_to_save(plan, state, checkpoints)
    return None, None


def _lora_of_main(plan: RunPlan, lora: TrainedLora | None, ranks: Ranks) -> TrainedLora:
    """Return the LoRA that rank 0 has saved. On another machine its path may not exist."""
    values = ranks.from_main(lambda: [lora.path, lora.name, lora.sha256, lora.folder] if lora else [])
    path, name, sha256, folder = values
    return TrainedLora(path, name, sha256, plan.request.model, folder, plan.request.adapter.is_full)


def _announce(plan: RunPlan, estimate: MemoryPlan | None, host: Host, ranks: Ranks) -> None:
    host.emit(RunOpened(plan.folder))
    warn_other_devices(ranks, host)
    if estimate:
        on_device = estimate.device_peak if estimate.machine.device_bytes else 0
        host.emit(MemoryPlanned(on_device, estimate.ram_peak))


def _resume_or_start_(
    state: TrainState, request: TrainRequest, checkpoints: Path, live: LiveValidation, host: Host, phases: PhaseTimer
) -> None:
    """Restore the newest checkpoint, if there is one; else finish the adapter's initialization."""

    def find() -> Path | None:
        return newest_intact(checkpoints, host, state.num_steps) if request.training.resume else None

    with checkpoint_for(state.ranks, find, reads_in_place=state.is_full) as newest:
        if newest:
            _resume(state, newest, live, host, phases)
        else:
            init_from_data_(state, request, host)
            if source := request.adapter.checkpoint:
                continue_(state, Path(source))
                text = f"the optimizer continues from {Path(source).name} of {Path(source).parents[1].name}"
                host.emit(Notice(f"{text}, and the batches after its last one"))
            share_start_(state)


def _resume(state: TrainState, checkpoint: Path, live: LiveValidation, host: Host, phases: PhaseTimer) -> None:
    """Restore a checkpoint, and do what its run was about to do when it was interrupted."""
    restore_(state, checkpoint, _loader(state))
    host.emit(Notice(f"resumed from step {state.step} of {state.num_steps}"))
    with phases("eval"):
        catch_up(state, host)
    live.catch_up(state)


def _loader(state: TrainState) -> Load:
    """Return what loads the tensors of a checkpoint."""
    if state.sharding is None:
        return load_weights_
    from .hooks.sharded.sharded_checkpoint import load_sharded_  # imports torch.distributed.checkpoint

    return load_sharded_


def _begin_folder(plan: RunPlan, record: Mapping[str, Any], prompt: Mapping[str, Any], host: Host) -> None:
    """Write what the run is: request, paths and devices of this machine, and manifest. Adopt another run's checkpoint."""
    if plan.resume_from:
        adopt(plan.resume_from, plan.folder, host)
    warn_other_versions(plan.folder, record, host)
    write_json(plan.folder / layout.REQUEST, record)
    write_local_values(plan.folder, prompt, record["workflow"])
    write_launch_values(plan.folder, plan.request.training)
    if message := write_manifest(plan.folder, plan.manifest):
        host.emit(Notice(message, "warning"))


def _free_memory(device: torch.device) -> None:
    """Free all memory that is no longer referenced."""
    gc.collect()
    empty_cache(device)
    empty_pinned(device)
    trim_heap()


def _save_unfinished(
    plan: RunPlan, state: TrainState, checkpoints: Path, record: Mapping[str, Any], host: Host
) -> None:
    """Whatever ended the run, save the LoRA of its last consistent step, and a checkpoint to resume from.

    An interrupt can hit the middle of a step, where weights and optimizer do not belong together. Such a state is never
    saved: the newest checkpoint takes its place. An error while saving is logged, and does not hide the one that ended
    the run.
    """
    is_together = not state.sharding or state.ranks.size == 1 or state.ranks.ends_together
    if is_together:
        _finish_background_save(state, host)
    if state.sharding and not (state.is_consistent and is_together):
        text = "the weights of all devices can't be saved here, because one of them ended alone, or within a step; "
        host.emit(Notice(text + "run it again to resume from the last checkpoint", "warning"))
        return
    try:
        if not state.is_consistent and not _restore_newest(state, checkpoints, host):
            return
        if state.step == 0:
            return
        save_and_prune(checkpoints, state, host, evaluate=False)
        if state.ranks.is_main:
            save_lora(plan, state, record, host)
        else:
            help_to_save(plan, state)
    except (OSError, UserError, RuntimeError) as error:
        host.emit(Notice(f"the state of step {state.step} could not be saved: {error}", "warning"))
        return
    host.emit(
        Notice(f"stopped at step {state.step} of {state.num_steps}; run it again to resume from there", "warning")
    )


def _finish_background_save(state: TrainState, host: Host) -> None:
    """Wait for a checkpoint that is being written. The run ends for another reason, so an error is only logged."""
    try:
        if state.background_save:
            state.background_save.wait()
    except (OSError, UserError, RuntimeError) as error:
        host.emit(Notice(f"a checkpoint could not be saved: {error}", "warning"))


def _restore_newest(state: TrainState, checkpoints: Path, host: Host) -> bool:
    """Put the newest intact checkpoint in place of a state that was interrupted within a step. False where there is none."""
    newest = newest_intact(checkpoints, host, state.num_steps)
    if newest is None:
        host.emit(Notice("interrupted within a step, before the first checkpoint: there is nothing to save", "warning"))
        return False
    restore_(state, newest)
    state.is_consistent = True
    return True
