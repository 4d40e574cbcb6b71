"""What the loop promises of a device.

The host waits for it once a step, and a step which runs out of memory is retried.
"""

from __future__ import annotations

import gc
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import WHOLE, Case
from chroma_trainer.trainer_core.adapters.inject import adapter_state, trainable_parameters
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.devices import empty_cache, peak_vram_bytes, reset_peak, total_bytes
from chroma_trainer.trainer_core.host import Notice, StepReport
from chroma_trainer.trainer_core.train.step.loop import fit
from chroma_trainer.trainer_core.train.step.oom_recovery import OomRecovery
from chroma_trainer.trainer_core.train.step.state import TrainState
from context import Context, Finding
from machine import peak_reserved_bytes
from models import PROJECT
from random_runs import quiet_host, random_run, stir_
from torch import Tensor

SIZE = "medium"
SAID = "called a synchronizing"  # torch, of each wait
ALLOWED = "train_step"  # reads the loss and the gradient's norm, at once
WARM, WATCHED = 3, 2  # steps
LIMITED_STEP, NUM_STEPS = 3, 4


def look_for_waits(context: Context, **settings: Any) -> Finding:
    """Steps under torch's sync debug mode: waits are listed, then all but the reading of the loss are errors."""
    run, host = random_run(Case(**settings), context, SIZE, steps=WARM), quiet_host(context)
    fit(run, host)
    run.num_steps += WATCHED
    with waits_listed(context) as waits:
        fit(run, host)
    found: dict[str, Any] = {
        "waits_a_step": len(waits) / WATCHED,
        "places": sorted(set(waits)),
        "is_watched": context.is_cuda,
    }
    faults = [f"the host waits in {place}" for place in found["places"] if ALLOWED not in place]
    context.tell(found | {"faults": faults})
    run.num_steps += WATCHED
    try:
        with waits_refused(context) as reads:
            fit(run, host)
        found["reads_a_step"] = len(reads) / WATCHED
    except RuntimeError as error:
        faults.append(f"{str(error).splitlines()[0]} in {_place(traceback.extract_tb(error.__traceback__))}")
    if not context.is_cuda:
        return Finding("not watched: only CUDA tells when the host waits", found, faults)
    return Finding(f"{found['waits_a_step']:g} waits a step", found, faults)


@contextmanager
def waits_listed(context: Context) -> Iterator[list[str]]:
    """Meanwhile every wait for the device is listed, by the line of ours that it came from."""
    found: list[str] = []

    def note(message: Any, *_: Any, **__: Any) -> None:
        if SAID in str(message):
            found.append(_place(traceback.extract_stack()[:-1]))

    with warnings.catch_warnings(), _sync_debug("warn", context):
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield found


@contextmanager
def waits_refused(context: Context) -> Iterator[list[int]]:
    """Meanwhile a wait is an error, but for numbers that are read by tolist(); gives how many each of those read."""
    reads: list[int] = []
    tolist = Tensor.tolist

    def read(tensor: Tensor) -> Any:
        if tensor.device == context.device or tensor.device.type == context.device.type == "cuda":
            reads.append(tensor.numel())
        with _sync_debug("default", context):
            return tolist(tensor)

    Tensor.tolist = read  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with _sync_debug("error", context):
            yield reads
    finally:
        Tensor.tolist = tolist  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _sync_debug(mode: str, context: Context) -> Iterator[None]:
    if not context.is_cuda:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _place(stack: Any) -> str:
    """The last line of the trainer's in it."""
    for frame in reversed(stack):
        path = Path(frame.filename).resolve()
        if path.is_relative_to(PROJECT) and not path.is_relative_to(PROJECT / "benchmarks"):
            return f"{path.name}:{frame.lineno} {frame.name}: {frame.line}"
    return "torch"


def run_out_of_memory(context: Context) -> Finding:
    """A step that is left less memory than it takes.

    The loop stores less and retries it, and ends with the weights of a run that had enough.
    """
    # math: its backward pass always adds in the same order. In a rehearsal so large that activations weigh something.
    case = Case(batch=2, edge=context.pick(512, 2048), attention="math")
    most, least = replace(case, interval=64), replace(case, interval=1)
    plain, peak = trained(most, context)
    context.tell({"peak_gb": peak["allocated"] / 1e9})
    _, small = trained(least, context)
    limit = (peak["allocated"] + small["reserved"]) // 2
    found: dict[str, Any] = {
        "stored_gb": round(peak["allocated"] / 1e9, 4), "computed_again_gb": round(small["reserved"] / 1e9, 4),
        "limit_gb": round(limit / 1e9, 4),
    }  # fmt: skip
    context.tell(found)
    if can_be_limited(context) and small["reserved"] >= 0.98 * peak["allocated"]:
        return Finding("", found, ["no limit lies between all stored and all computed again"])
    relieved, seen = trained(most, context, limit)
    found["notices"] = seen["notices"]
    is_same = _same(plain, relieved)
    faults = [] if any("retried" in text for text in seen["notices"]) else ["no step ran out of memory"]
    faults += [] if is_same else ["the weights are not those of a run that had enough memory"]
    by_what = "" if can_be_limited(context) else " (the error was raised by hand: this device has no limit)"
    told = [*seen["notices"], f"{'the same' if is_same else 'other'} bytes{by_what}"]
    return Finding("; ".join(told), found, faults)


def trained(case: Case, context: Context, limit: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights after a few steps, peaks of one of them, and notices of the loop.

    limit: bytes that this step may take, None: as many as there are.
    """
    notices: list[str] = []
    peaks: dict[str, Any] = {"allocated": 0, "reserved": 0, "notices": notices}
    chosen = quiet_host(context, sinks=(lambda event: heed(event),))
    run = random_run(case, context, SIZE, steps=NUM_STEPS, host=chosen)
    stir_(run)
    asked, memory = MemoryConfig(mode="auto"), MemoryConfig(checkpointing_interval=case.interval)
    run.oom_recovery = OomRecovery.where_auto(
        asked, memory, run.config, run.family.blocks(run.transformer), run.device, chosen
    )
    notices.clear()
    lift: list[Callable[[], None]] = []

    def heed(event: Any) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)
        if isinstance(event, StepReport) and event.step == LIMITED_STEP - 1:
            gc.collect()
            empty_cache(run.device)
            reset_peak(run.device)
            if limit is not None:
                lift.append(limited(run, limit, context))
        if isinstance(event, StepReport) and event.step == LIMITED_STEP:
            peaks["allocated"] = peak_vram_bytes(run.device)
            peaks["reserved"] = peak_reserved_bytes(run.device) or peaks["allocated"]
            for call in lift:
                call()

    try:
        fit(run, chosen)
    finally:
        for call in lift:
            call()
    return adapter_state(run.layers), peaks


def train_whole(context: Context) -> Finding:
    """Kind full: weights after a few steps, again, and with the weights in RAM and copied ahead of their block.

    All three are the same bytes, finite, and not those of the start.
    """
    in_ram = replace(WHOLE, offload="block", stream=True)
    first, norms, before = steps_of_whole(WHOLE, context)
    again, (moved, _, _) = steps_of_whole(WHOLE, context)[0], steps_of_whole(in_ram, context)
    still = [name for name, tensor in first.items() if torch.equal(tensor, before[name])]
    bad = [name for name, tensor in first.items() if not tensor.isfinite().all()]
    found: dict[str, Any] = {
        "norms": norms, "num_tensors": len(first), "num_unmoved": len(still), "is_repeatable": _same(first, again),
        "is_same_in_ram": _same(first, moved),
    }  # fmt: skip
    faults = [f"{len(bad)} weights are not finite, such as {bad[0]}"] if bad else []
    faults += [] if len(still) < len(first) // 2 else [f"{len(still)} of {len(first)} weights have not moved"]
    faults += [] if found["is_repeatable"] else ["a second run ends in other bytes"]
    faults += [] if found["is_same_in_ram"] else ["with its weights in RAM it ends in other bytes"]
    told = "the same bytes twice" if found["is_repeatable"] else "other bytes"
    return Finding(f"{told}, and in RAM {'the same' if found['is_same_in_ram'] else 'others'}", found, faults)


def steps_of_whole(case: Case, context: Context) -> tuple[dict[str, Tensor], list[float], dict[str, Tensor]]:
    """Weights after some steps, the norms of their gradients, and the weights before. On the CPU."""
    norms: list[float] = []
    sinks = (lambda event: norms.append(event.grad_norm) if isinstance(event, StepReport) else None,)
    host = quiet_host(context, sinks=sinks)
    run = random_run(case, context, SIZE, steps=NUM_STEPS, host=host)
    before = _on_host(run)
    fit(run, host)
    return _on_host(run), norms, before


def _on_host(run: TrainState) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in trainable_parameters(run.layers)}


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def can_be_limited(context: Context) -> bool:
    """Whether the device's allocator takes a limit. The second device of the tests does."""
    return context.is_cuda or _second() is not None


def _second() -> Any:
    """The library behind the second device of the tests, where that stands for a GPU."""
    return getattr(sys.modules.get("second"), "library", None)


def limited(run: TrainState, limit: int, context: Context) -> Callable[[], None]:
    """From now on memory runs out beyond so many bytes; on a CPU once, in the last block. Gives what lifts it."""
    if second := _second():
        second.second_limit(limit)
        return lambda: second.second_limit(0)
    if context.is_cuda:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total_bytes(run.device)))
        return lambda: torch.cuda.set_per_process_memory_fraction(1.0)

    def fail(*_: Any) -> None:
        hook.remove()
        raise torch.OutOfMemoryError("out of memory, as a rehearsal has it")

    hook: Any = run.family.blocks(run.transformer)[-1].register_forward_pre_hook(fail)
    return hook.remove
