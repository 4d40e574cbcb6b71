"""Noise levels of a sampling run, equal to ComfyUI's behind ModelSamplingAuraFlow, bit for bit.

That model sampling holds a table of 1000 levels, s_i = shift_sigma(i / 1000), and its schedulers read it in three ways.
They are restated here from their behaviour; tests hold ComfyUI's own figures.
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
    """Levels from (nearly) 1 down to 0; sampling goes from each to the next.

    Args:
        scheduler: "beta", "simple" or "normal".
        steps: 1 or more.
        shift: as in ModelSamplingAuraFlow; 1 leaves the levels.
    Returns:
        (steps + 1,), fp32. `beta` may give fewer: of many steps some share a level, which is then visited once.
    """
    assert steps >= 1
    table = shift_sigma(torch.arange(1, NUM_LEVELS + 1) / NUM_LEVELS, shift)
    return {"beta": _beta, "simple": _simple, "normal": _normal}[scheduler](table, steps, shift)


def _beta(table: Tensor, steps: int, shift: float) -> Tensor:
    """Levels at quantiles of Beta(0.6, 0.6): dense at both ends."""
    width = 1 / steps
    indices = [round(quantile(1 - i * width, BETA_SHAPE, BETA_SHAPE) * (NUM_LEVELS - 1)) for i in range(steps)]
    distinct = [k for i, k in enumerate(indices) if i == 0 or k != indices[i - 1]]
    return torch.cat([table[distinct], table.new_zeros(1)])


def _simple(table: Tensor, steps: int, shift: float) -> Tensor:
    """Every (1000 / steps)-th level, from the top."""
    stride = NUM_LEVELS / steps
    return torch.cat([table[[NUM_LEVELS - 1 - int(i * stride) for i in range(steps)]], table.new_zeros(1)])


def _normal(table: Tensor, steps: int, shift: float) -> Tensor:
    """Equal distances between the highest and the lowest level. ComfyUI shifts here a second time, and so do we."""
    high, low = float(table[-1]), float(table[0])
    ends_at_zero = math.isclose(float(shift_sigma(table[0], shift)), 0, abs_tol=NEARLY_ZERO)
    levels = shift_sigma(torch.linspace(high, low, steps + ends_at_zero), shift)
    return levels if ends_at_zero else torch.cat([levels, levels.new_zeros(1)])
