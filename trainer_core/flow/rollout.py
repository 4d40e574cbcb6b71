"""Rollouts: train at points that the model reaches, not on the straight path (scheduled sampling).

When an image is sampled, each step starts where the previous one ended. Training on the straight path only sees points
that no step has erred on. A rollout computes

    x_hat = Euler steps of the model from x_s' = (1 - s') x0 + s' noise  down to  sigma < s'

The target at x_hat is the velocity that leads from there to the image, (x_hat - x0) / sigma. On the path it equals
noise - x0. It contains an error of the steps multiplied by (s' - sigma) / sigma, which is unbounded for small sigma.
Therefore the loss compares

    (sigma / s') v_theta(x_hat, sigma)   and   (x_hat - x0) / s'

The difference is the error of the image, x_hat - sigma v_theta - x0, in units of the sigma at which the steps start.
At s' = sigma this is the velocity loss, and for a sample without error it is the velocity loss up to its weight. See
docs/decisions/0026 for the reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

STRIDE = 0.04  # decrease of sigma per step: that of an image sampled in 25 equal steps


def rollout_levels(sigma: Tensor, num_steps: int) -> Tensor:
    """Return sigmas that fall evenly to `sigma`, from STRIDE x num_steps above it or from 1: (num_steps + 1, B).

    Args:
        sigma: In [0, 1], (B,), fp32; the last row is exactly sigma.
        num_steps: >= 1.
    """
    above = torch.clamp(1 - sigma, max=STRIDE * num_steps)
    fraction = torch.arange(num_steps, -1, -1, dtype=sigma.dtype, device=sigma.device) / num_steps
    return (sigma + fraction[:, None] * above).clamp(max=1)


def descend(predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, levels: Tensor) -> Tensor:
    """Take Euler steps down the sigmas.

    Args:
        predict: From x (B, C, h, w) and sigma (B,), returns the velocity at x.
        x: Latents at the first sigma, (B, C, h, w).
        levels: Sigmas, (steps + 1, B).
    Returns:
        x at the last sigma, in the precision of x.
    """
    for here, there in pairwise(levels):
        x = x + (there - here).view(-1, 1, 1, 1) * predict(x, here).to(x)
    return x


def way_back(x_hat: Tensor, x0: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the loss compares at the end of a rollout.

    Returns:
        target: (x_hat - x0) / s', (B, C, h, w).
        share: sigma / s', (B, 1, 1, 1), the factor of the prediction; 1 where both are 0.
    """
    start, sigma = levels[0].view(-1, 1, 1, 1), levels[-1].view(-1, 1, 1, 1)
    target = (x_hat - x0) / start.clamp_min(torch.finfo(start.dtype).tiny)
    return target, torch.where(start > sigma, sigma / start, 1.0)
