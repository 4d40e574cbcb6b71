"""The model's own way to a noise level, in place of the straight path: scheduled sampling.

A picture is drawn in steps, each from where the one before has led; training shows the straight path alone, where no step has erred. Here

    x_hat = Euler steps of the model from x_s' = (1 - s') x0 + s' noise  down to  sigma < s'

and what is wanted at x_hat is the velocity that leads from there to the picture, (x_hat - x0) / sigma. On the path that is noise - x0.
An error of the steps stands in it (s' - sigma) / sigma times over, without bound for a small sigma; so that the loss is taken of

    (sigma / s') v_theta(x_hat, sigma)   and   (x_hat - x0) / s'

which is the error of the picture, x_hat - sigma v_theta - x0, in units of the level where the steps began. At s' = sigma, and for a sample
without error but for its weight, that is the velocity loss. docs/decisions/0026 has the reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

STRIDE = 0.04  # of the noise level, a step: a picture drawn in 25 even ones


def rollout_levels(sigma: Tensor, num_steps: int) -> Tensor:
    """Noise levels that fall evenly to sigma from STRIDE x num_steps above it, or from 1: (num_steps + 1, B).

    Args:
        sigma: in [0, 1], (B,), fp32; the last row is sigma to the bit.
        num_steps: >= 1.
    """
    above = torch.clamp(1 - sigma, max=STRIDE * num_steps)
    left = torch.arange(num_steps, -1, -1, dtype=sigma.dtype, device=sigma.device) / num_steps
    return (sigma + left[:, None] * above).clamp(max=1)


def descend(predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, levels: Tensor) -> Tensor:
    """Euler steps down the levels.

    Args:
        predict: from x (B, C, h, w) and sigma (B,), the velocity at x.
        x: at the first level, (B, C, h, w). levels: (steps + 1, B).
    Returns:
        x at the last level, in the precision of x.
    """
    for here, there in pairwise(levels):
        x = x + (there - here).view(-1, 1, 1, 1) * predict(x, here).to(x)
    return x


def way_back(x_hat: Tensor, x0: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """What the loss compares at the end of a rollout.

    Returns:
        target: (x_hat - x0) / s', (B, C, h, w). share: sigma / s', (B, 1, 1, 1), what a prediction is multiplied by; 1 where both are 0.
    """
    start, sigma = levels[0].view(-1, 1, 1, 1), levels[-1].view(-1, 1, 1, 1)
    target = (x_hat - x0) / start.clamp_min(torch.finfo(start.dtype).tiny)
    return target, torch.where(start > sigma, sigma / start, 1.0)
