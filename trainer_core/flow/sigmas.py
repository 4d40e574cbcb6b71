"""Sigmas of a sampling run, bit-identical to ComfyUI's.

Its schedulers choose from a table of N sigmas, s_i = shift_sigma(i / N), in three ways. N is 1000 for models without a
guidance embedding and after a node ModelSamplingAuraFlow, and 10,000 for Flux models with one (ModelSamplingFlux).
They are reimplemented here from their behavior; tests compare with numbers from ComfyUI.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .incomplete_beta import quantile
from .sigma_density import shift_sigma

NUM_LEVELS, NUM_LEVELS_FLUX = 1000, 10_000
BETA_SHAPE = 0.6  # Lee et al. 2024, arXiv:2407.12173
NEARLY_ZERO = 1e-5


def sampling_sigmas(scheduler: str, steps: int, shift: float = 1.0, num_levels: int = NUM_LEVELS) -> Tensor:
    """Return sigmas from (nearly) 1 down to 0. Each sampling step goes from one to the next.

    Args:
        scheduler: "beta", "simple" or "normal".
        steps: 1 or more.
        shift: As in ModelSamplingAuraFlow; 1 for no shift. ModelSamplingFlux takes its logarithm.
        num_levels: Size of the table, see Family.num_noise_levels.
    Returns:
        (steps + 1,), fp32. `beta` may return fewer: with many steps some share a sigma, which is then used once.
    """
    assert steps >= 1
    table = shift_as_comfyui(torch.arange(1, num_levels + 1) / num_levels, shift, num_levels)
    if scheduler == "normal":
        return _normal(table, steps, shift)
    return {"beta": _beta, "simple": _simple}[scheduler](table, steps)


def shift_as_comfyui(sigma: Tensor, shift: float, num_levels: int) -> Tensor:
    """Return shift_sigma(sigma, shift), for Flux's table as ModelSamplingFlux computes it: other last bits."""
    return shift / (shift + (1 / sigma - 1)) if num_levels == NUM_LEVELS_FLUX else shift_sigma(sigma, shift)


def _beta(table: Tensor, steps: int) -> Tensor:
    """Return sigmas at quantiles of Beta(0.6, 0.6): dense at both ends."""
    width = 1 / steps
    indices = [round(quantile(1 - i * width, BETA_SHAPE, BETA_SHAPE) * (len(table) - 1)) for i in range(steps)]
    distinct = [k for i, k in enumerate(indices) if i == 0 or k != indices[i - 1]]
    return torch.cat([table[distinct], table.new_zeros(1)])


def _simple(table: Tensor, steps: int) -> Tensor:
    """Return every (N / steps)-th sigma, from the top."""
    stride = len(table) / steps
    return torch.cat([table[[len(table) - 1 - int(i * stride) for i in range(steps)]], table.new_zeros(1)])


def _normal(table: Tensor, steps: int, shift: float) -> Tensor:
    """Return equally spaced sigmas between the highest and the lowest.

    Like ComfyUI, this applies the shift a second time.
    """
    high, low = float(table[-1]), float(table[0])
    ends_at_zero = math.isclose(float(shift_as_comfyui(table[0], shift, len(table))), 0, abs_tol=NEARLY_ZERO)
    levels = shift_as_comfyui(torch.linspace(high, low, steps + ends_at_zero), shift, len(table))
    return levels if ends_at_zero else torch.cat([levels, levels.new_zeros(1)])
