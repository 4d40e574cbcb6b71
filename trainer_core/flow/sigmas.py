"""Sigmas of a sampling run, bit-identical to ComfyUI's with ModelSamplingAuraFlow.

That model sampling has a table of 1000 sigmas, s_i = shift_sigma(i / 1000), which its schedulers use in three ways.
They
are reimplemented here from their behavior; tests compare with numbers from ComfyUI.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .incomplete_beta import quantile
from .sigma_density import shift_sigma

NUM_LEVELS = 1000
BETA_SHAPE = 0.6  # Lee et al. 2024, arXiv:2407.12173
NEARLY_ZERO = 1e-5


def sampling_sigmas(scheduler: str, steps: int, shift: float = 1.0) -> Tensor:
    """Return sigmas from (nearly) 1 down to 0. Each sampling step goes from one to the next.

    Args:
        scheduler: "beta", "simple" or "normal".
        steps: 1 or more.
        shift: As in ModelSamplingAuraFlow; 1 for no shift.
    Returns:
        (steps + 1,), fp32. `beta` may return fewer: with many steps some share a sigma, which is then used once.
    """
    assert steps >= 1
    table = shift_sigma(torch.arange(1, NUM_LEVELS + 1) / NUM_LEVELS, shift)
    return {"beta": _beta, "simple": _simple, "normal": _normal}[scheduler](table, steps, shift)


def _beta(table: Tensor, steps: int, shift: float) -> Tensor:
    """Return sigmas at quantiles of Beta(0.6, 0.6): dense at both ends."""
    width = 1 / steps
    indices = [round(quantile(1 - i * width, BETA_SHAPE, BETA_SHAPE) * (NUM_LEVELS - 1)) for i in range(steps)]
    distinct = [k for i, k in enumerate(indices) if i == 0 or k != indices[i - 1]]
    return torch.cat([table[distinct], table.new_zeros(1)])


def _simple(table: Tensor, steps: int, shift: float) -> Tensor:
    """Return every (1000 / steps)-th sigma, from the top."""
    stride = NUM_LEVELS / steps
    return torch.cat([table[[NUM_LEVELS - 1 - int(i * stride) for i in range(steps)]], table.new_zeros(1)])


def _normal(table: Tensor, steps: int, shift: float) -> Tensor:
    """Return equally spaced sigmas between the highest and the lowest. Like ComfyUI, this applies the shift a second
    time.
    """
    high, low = float(table[-1]), float(table[0])
    ends_at_zero = math.isclose(float(shift_sigma(table[0], shift)), 0, abs_tol=NEARLY_ZERO)
    levels = shift_sigma(torch.linspace(high, low, steps + ends_at_zero), shift)
    return levels if ends_at_zero else torch.cat([levels, levels.new_zeros(1)])
