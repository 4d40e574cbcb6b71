"""The learning rate of each step: a pure function, so that it is the same after a resume."""

from __future__ import annotations

import math

from ..config.optimizer import OptimizerConfig
from ..config.training import TrainingConfig


def learning_rate_at(
    step: int,
    *,
    peak: float,
    schedule: str,
    warmup_steps: int,
    num_steps: int,
    num_cycles: int = 1,
    power: float = 1.0,
    decay_share: float = 0.2,
    min_ratio: float = 0.0,
) -> float:
    """The rate of optimiser step `step`.

    Warm-up (step < W):  peak (step + 1) / (W + 1): above 0 from the first step on, and the peak itself at step W.
    After it, with p = (step - W) / (N - W), in [0, 1):  peak (low + (1 - low) f(p)), where f is

        constant, constant_with_warmup: 1 (low does not matter)
        linear: 1 - p,   polynomial: (1 - p)^power,   cosine: (1 + cos(pi p)) / 2
        cosine_with_restarts: (1 + cos(pi q)) / 2 with q = p n mod 1 for n cycles
        wsd: 1 until p = 1 - s, then 1 - sqrt(q) with q = (p - 1 + s) / s, over the last share s

    p reaches 1 only after the last step, so no step is spent at rate 0: the last one, N - 1, has p = 1 - 1 / (N - W).
    Where W >= N, the run ends within its warm-up.

    Args:
        step: counted from 0.
        peak: highest rate.
        schedule: one of the names above.
        warmup_steps: W, steps of climbing; every schedule has them, constant as well.
        num_steps: N, steps of the whole run.
        min_ratio: low, the lowest rate after warm-up as a share of the peak.
    Source: wsd with this fall: Hägele et al. 2024, arXiv:2405.18392. Restarts: Loshchilov and Hutter, arXiv:1608.03983.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule in ("constant", "constant_with_warmup"):
        return peak
    p = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return peak * (min_ratio + (1 - min_ratio) * _course(schedule, p, num_cycles, power, decay_share))


def _course(schedule: str, p: float, num_cycles: int, power: float, decay_share: float) -> float:
    """f(p), from 1 down to 0."""
    if schedule == "linear":
        return 1 - p
    if schedule == "polynomial":
        return (1 - p) ** power
    if schedule == "wsd":
        return 1 - math.sqrt(max(0.0, (p - 1 + decay_share) / decay_share))
    if schedule == "cosine_with_restarts":
        p = p * num_cycles % 1.0 if p < 1 else 1.0
    else:
        assert schedule == "cosine", f"no schedule is called {schedule!r}"
    return (1 + math.cos(math.pi * p)) / 2


def rate_of(step: int, training: TrainingConfig, optimizer: OptimizerConfig, num_steps: int) -> float:
    """The rate of a step by the settings of a run."""
    return learning_rate_at(
        step, peak=training.learning_rate, schedule=training.lr_schedule, warmup_steps=training.warmup_steps,
        num_steps=num_steps, num_cycles=optimizer.lr_num_cycles, power=optimizer.lr_power,
        decay_share=optimizer.lr_decay_share, min_ratio=optimizer.lr_min_ratio,
    )  # fmt: skip
