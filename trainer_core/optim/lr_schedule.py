"""The learning rate of each step, a pure function of the step, so that resumed runs use the same values."""

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
    """Return the learning rate of optimizer step `step`.

    Warm-up (step < W): peak (step + 1) / (W + 1), which is above 0 from the first step on and reaches the peak at step
    W. After it, with p = (step - W) / (N - W) in [0, 1): peak (low + (1 - low) f(p)), where f is

        constant, constant_with_warmup: 1 (low is ignored)
        linear: 1 - p,   polynomial: (1 - p)^power,   cosine: (1 + cos(pi p)) / 2
        cosine_with_restarts: (1 + cos(pi q)) / 2 with q = p n mod 1 for n cycles
        wsd: 1 until p = 1 - s, then 1 - sqrt(q) with q = (p - 1 + s) / s, over the last share s

    p would reach 1 only after the last step, so no step has a rate of 0: the last one, N - 1, has p = 1 - 1 / (N - W).
    If W >= N, the run ends during warm-up.

    Args:
        step: Step, counted from 0.
        peak: Highest learning rate.
        schedule: One of the names above.
        warmup_steps: W, number of warm-up steps. Applies to every schedule, constant as well.
        num_steps: N, number of steps of the whole run.
        num_cycles: n, for cosine_with_restarts.
        power: Exponent, for polynomial.
        decay_share: s, for wsd.
        min_ratio: low, the lowest rate after warm-up as a share of the peak.
    Source: wsd with this decay: Hägele et al. 2024, arXiv:2405.18392. Restarts: Loshchilov and Hutter,
    arXiv:1608.03983.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule in ("constant", "constant_with_warmup"):
        return peak
    p = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return peak * (min_ratio + (1 - min_ratio) * _decay(schedule, p, num_cycles, power, decay_share))


def _decay(schedule: str, p: float, num_cycles: int, power: float, decay_share: float) -> float:
    """Return f(p), which falls from 1 to 0."""
    if schedule == "linear":
        return 1 - p
    if schedule == "polynomial":
        return (1 - p) ** power
    if schedule == "wsd":
        return 1 - math.sqrt(max(0.0, (p - 1 + decay_share) / decay_share))
    if schedule == "cosine_with_restarts":
        p = p * num_cycles % 1.0 if p < 1 else 1.0
    else:
        assert schedule == "cosine", f"unknown schedule {schedule!r}"
    return (1 + math.cos(math.pi * p)) / 2


def rate_of(step: int, training: TrainingConfig, optimizer: OptimizerConfig, num_steps: int) -> float:
    """Return the learning rate of a step from a run's settings."""
    return learning_rate_at(
        step, peak=training.learning_rate, schedule=training.lr_schedule, warmup_steps=training.warmup_steps,
        num_steps=num_steps, num_cycles=optimizer.lr_num_cycles, power=optimizer.lr_power,
        decay_share=optimizer.lr_decay_share, min_ratio=optimizer.lr_min_ratio,
    )  # fmt: skip
