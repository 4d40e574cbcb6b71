"""Steps of the full-size model with random weights in memory, through the product's own loop.

Told are seconds, share of the limit, launches and memory; of the same settings what the plan says.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from dataclasses import asdict
from statistics import median
from typing import Any

from cases import STEPS, TRACED, Case
from chroma_trainer.trainer_core.devices import empty_cache, peak_ram_bytes, peak_vram_bytes, reset_peak
from chroma_trainer.trainer_core.host import StepReport
from chroma_trainer.trainer_core.planner.cost_model import Shape, step_flops
from chroma_trainer.trainer_core.planner.meta_model import MetaModel
from chroma_trainer.trainer_core.planner.step_peak import blocks_to_recompute, training_peak
from chroma_trainer.trainer_core.registry import load
from chroma_trainer.trainer_core.train.step.loop import fit
from chroma_trainer.trainer_core.train.step.state import TrainState
from context import Context, Finding
from gradients import begin_pass
from launches import launches_of, write_trace
from machine import peak_reserved_bytes
from random_runs import (
    RANK,
    TARGETS,
    faults_of,
    gradients_of,
    quiet_host,
    random_run,
    request_of,
    scaled,
    stir_,
    text_tokens,
)

SIZE = "true"
WARM, COMPILED_WARM = 2, 3  # steps
STEPS_TIMED, FEWEST, SECONDS_TIMED = 10, 4, 5.0  # no more steps than these seconds hold, but so many


def measure(context: Context, **settings: Any) -> Finding:
    """One of STEPS."""
    case = Case(**settings)
    told: list[StepReport] = []

    def heed(event: Any) -> None:
        if isinstance(event, StepReport):
            told.append(event)
            begin_pass(case, context)

    host = quiet_host(context, sinks=(heed,))
    run, found = build(case, context, host)
    begin_pass(case, context)
    faults = step_once(run, host, found, context) if case.is_full else pass_once(run, found, context)
    if faults:
        return Finding("nothing was timed", found, faults)
    take(run, host, COMPILED_WARM if case.compiled else context.pick(WARM, 1))
    found |= time_steps(run, host, case, context)
    context.tell(found)
    found["launches"] = count_launches(run, host, found["seconds_a_step"], context)
    if context.is_traced and case == TRACED:
        write_trace(lambda: take(run, host, 1), context, context.out / f"trace-{case.name}.json.gz")
    if not all(math.isfinite(event.loss) and math.isfinite(event.grad_norm) for event in told):
        faults.append("a loss or a gradient is not finite")
    found["losses"] = [round(event.loss, 6) for event in told]
    return Finding(in_words(found), found, faults)


def build(case: Case, context: Context, host: Any) -> tuple[TrainState, dict[str, Any]]:
    """The run, and what is to be said of it."""
    began = time.perf_counter()
    run = random_run(case, context, SIZE, host=host)
    stir_(run)
    reset_peak(context.device)
    return run, {
        "case": {**asdict(case), "edge": scaled(case, context).edge}, "targets": TARGETS, "rank": RANK,
        "text_tokens": text_tokens(case, context), "attention": run.attention,
        "num_trained": sum(p.numel() for p in run.parameters), "build_seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def pass_once(run: TrainState, found: dict[str, Any], context: Context) -> list[str]:
    """One forward and backward pass, whose gradients are looked at one by one. Gives their faults."""
    began = time.perf_counter()
    loss, gradients = gradients_of(run)
    found["first_seconds"] = round(time.perf_counter() - began, 2)
    found["first_peak_gb"] = gigabytes(peak_vram_bytes(context.device))
    faults = list(faults_of(run, loss, gradients))
    context.tell(found | {"faults": faults})
    return faults


def step_once(run: TrainState, host: Any, found: dict[str, Any], context: Context) -> list[str]:
    """One step of a whole model, whose gradients are gone before the next one comes. Gives their faults, by norms."""
    began = time.perf_counter()
    take(run, host, 1)
    found["first_seconds"] = round(time.perf_counter() - began, 2)
    found["first_peak_gb"] = gigabytes(peak_vram_bytes(context.device))
    faults = [] if math.isfinite(run.grad_norm) and run.grad_norm > 0 else [f"the gradient's norm is {run.grad_norm}"]
    context.tell(found | {"faults": faults})
    return faults


def take(run: TrainState, host: Any, count: int) -> None:
    """So many steps more."""
    run.num_steps = run.step + count
    fit(run, host)


def time_steps(run: TrainState, host: Any, case: Case, context: Context) -> dict[str, Any]:
    """A few steps in a row and their peaks. Seconds are the loop's own: a step waits for the device at its end."""
    gc.collect()
    empty_cache(context.device)
    reset_peak(context.device)
    run.step_seconds.clear()
    take(run, host, context.pick(FEWEST, 2))
    more = int(SECONDS_TIMED / max(run.step_seconds)) - FEWEST
    if not context.is_rehearsal and more > 0:
        take(run, host, min(more, STEPS_TIMED - FEWEST))
    seconds, middle = list(run.step_seconds), median(run.step_seconds)
    work = flops(run.transformer, scaled(case, context), text_tokens(case, context))
    share = round(work / context.limit_flops / middle, 4) if context.limit_flops else None
    return {
        "seconds_a_step": round(middle, 4), "steps": len(seconds), "fastest": round(min(seconds), 4),
        "slowest": round(max(seconds), 4), "tflop_a_step": round(work / 1e12, 6), "share_of_limit": share,
        "peak_vram_gb": gigabytes(peak_vram_bytes(context.device)),
        "peak_reserved_gb": gigabytes(peak_reserved_bytes(context.device)),
        "peak_ram_gb": gigabytes(peak_ram_bytes()),
    }  # fmt: skip


def count_launches(run: TrainState, host: Any, seconds: float, context: Context) -> dict[str, Any]:
    """See launches_of. Profiling slows the host, so that the idle share is also told against a step without it."""
    found = launches_of(lambda: take(run, host, 1), context)
    if busy := found.get("busy_seconds"):
        found["idle_share_unprofiled"] = round(max(0.0, 1 - busy / seconds), 3)
    return found


def in_words(found: dict[str, Any]) -> str:
    """For one line."""
    launches, share = found["launches"], found["share_of_limit"]
    words = [f"{found['seconds_a_step']:.3f} s a step", f"{share:.2f} of the limit" if share else ""]
    words += [f"{launches['count']} launches"]
    words += (
        [f"{launches['host_calls']} calls ({launches['graph_calls']} of graphs)"] if "host_calls" in launches else []
    )
    words += [f"idle {launches['idle_share']:.0%}" if launches["idle_share"] is not None else ""]
    words += [f"{found['peak_vram_gb']:.2f} GB" if found["peak_vram_gb"] else "", f"attention {found['attention']}"]
    return ", ".join(word for word in words if word)


def flops(transformer: Any, case: Case, tokens: int) -> float:
    """Of one step, as docs/performance.md counts its limits: the base's products and attention alone.

    A block that is computed again counts a whole forward pass more, although the product leaves out a part of that. A
    whole model's weights have gradients too.
    """
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    tokens += (case.edge // 16) ** 2
    width = transformer.inner_dim
    # A token goes through one stream of a double block (4 + 8 width^2), and all of a single one (3 + 4 + 5 width^2).
    linear = 2 * 12 * width**2 * len(blocks) * tokens
    attention = 4 * tokens**2 * width * len(blocks)
    again = len(blocks[:: case.interval]) / len(blocks) if case.interval else 0.0
    of_weights = linear if case.is_full else 0.0
    return case.batch * (linear * (2 + again) + attention * (3.5 + again) + of_weights)


def gigabytes(size: int) -> float | None:
    """None for nothing: a CPU has no such figure."""
    return round(size / 1e9, 3) if size else None


def forecast(context: Context) -> Finding:
    """What the plan says of every one of STEPS, counted without a device."""
    found: dict[str, Any] = {}
    for case in STEPS:
        found[case.name] = forecast_of(scaled(case, context), context)
        context.tell({"cases": found})
    return Finding(f"plans of {len(found)} step cases", {"cases": found})


def forecast_of(case: Case, context: Context) -> dict[str, Any]:
    """Peak of tensors on the device, and operations, the LoRA's among them."""
    request = request_of(case, context, SIZE)
    rows = text_tokens(case, context) + (case.family == "flux")
    skeleton = skeleton_of(case.family, case.level, case.products, case.kind, case.optimizer, context)
    cost = skeleton.cost(Shape(case.edge, case.edge, case.batch, rows))
    work = step_flops(cost, blocks_to_recompute(request, len(cost.blocks)))
    return {"peak_gb": round(training_peak(cost, request)[0] / 1e9, 3), "tflop_a_step": round(work / 1e12, 6)}


@functools.cache
def skeleton_of(family: str, level: str, products: str, kind: str, optimizer: str, context: Context) -> MetaModel:
    """Counts every shape of these; makes no numbers."""
    case = Case(family=family, level=level, products=products, kind=kind, optimizer=optimizer)
    request = request_of(case, context, SIZE)
    return MetaModel(load("family", family)(), request, "cuda")
