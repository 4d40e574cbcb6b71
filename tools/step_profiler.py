"""What a step truly takes on a CPU: every allocation of torch's allocator, kernels' own among them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..trainer_core.planner.meta_counter import bytes_of
from ..trainer_core.train.step.loop import train_step
from ..trainer_core.train.step.state import TrainState


def resident_bytes(run: TrainState) -> int:
    """Weights, adapter, the optimiser's states, averages and tables of positions: tensors that outlive a step."""
    states = [t for state in run.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    kept: Any = run.transformer.__dict__.get("_rope_by_shape", {})
    tables = [table for pair in kept.values() for table in pair]
    averages = run.ema.averages.values() if run.ema is not None else ()
    return bytes_of(*run.transformer.parameters(), *run.transformer.buffers(), *states, *tables, *averages)


def measured_peak(step: Callable[[], Any]) -> int:
    """Most bytes allocated during a call, above what was there before it. What earlier calls left is cleared away first, not meanwhile."""
    gc.collect()
    with _no_collection(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    results: Any = trace.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        peak = max(peak, now)
    return peak


@contextmanager
def _no_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def measured_step_peak(run: TrainState) -> int:
    """Peak bytes of tensors in the run's second step, what was there before included."""
    train_step(run, 1e-4)
    run.step += 1
    return resident_bytes(run) + measured_peak(lambda: train_step(run, 1e-4))
