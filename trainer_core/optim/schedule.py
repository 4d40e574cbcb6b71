"""The learning rate of each step: a pure function, so that it is the same after a resume."""

from __future__ import annotations

import math


def learning_rate_at(step: int, *, peak: float, schedule: str, warmup_steps: int, num_steps: int) -> float:
    """The rate of optimiser step `step`.

    Warm-up (step < W):  peak (step + 1) / (W + 1): above 0 from the first step on, and the peak itself at step W.
    After it, with p = (step - W) / (N - W), in [0, 1):
        constant: peak,   linear: peak (1 - p),   cosine: peak (1 + cos(pi p)) / 2
    p reaches 1 only after the last step, so no step is spent at rate 0: the last one, N - 1, has p = 1 - 1 / (N - W).
    Where W >= N, the run ends within its warm-up.

    Args:
        step: counted from 0.
        peak: highest rate.
        schedule: "constant", "linear" or "cosine".
        warmup_steps: W, steps of climbing.
        num_steps: N, steps of the whole run.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    if schedule == "linear":
        return peak * (1 - progress)
    assert schedule == "cosine", f"no schedule is called {schedule!r}"
    return peak * (1 + math.cos(math.pi * progress)) / 2
