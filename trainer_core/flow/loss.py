"""The training loss: the distance between two velocities, and its weight by the noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config.training import HUBER_C

LOWEST_SIGMA = 1e-3  # where sigma_sqrt is bounded: the lowest of the 1000 noise levels of other trainers


def velocity_loss(
    prediction: Tensor, target: Tensor, weight: Tensor | None = None, kind: str = "mse", huber_c: float = HUBER_C
) -> Tensor:
    """Return the mean error of each sample, in fp32.

    loss_b = mean(e(v_hat - v)),   with weights: mean(w e(v_hat - v)) / mean(w)

    Dividing by the mean weight keeps the loss of a small mask on the same scale as that of a whole image.

    Args:
        prediction: Velocity predicted by the model, (B, C, H, W), any float dtype.
        target: Velocity of the path, same shape.
        weight: Non-negative, of any shape that broadcasts to (B, C, H, W), such as a mask (B, 1, H, W). A sample whose
            weights are all 0 has loss 0.
        kind: The error e(d): "mse", "mae" or "huber", see `error_of`.
        huber_c: With "huber": where it changes from square to absolute.
    Returns:
        (B,), fp32.
    """
    error = error_of(prediction.float() - target.float(), kind, huber_c).flatten(1)
    if weight is None:
        return error.mean(1)
    w = weight.float().expand(prediction.shape).flatten(1)
    return (w * error).sum(1) / w.sum(1).clamp_min(torch.finfo(torch.float32).tiny)


def error_of(difference: Tensor, kind: str, huber_c: float = HUBER_C) -> Tensor:
    """Return the error of each element.

    mse: d^2.   mae: |d|.   huber: 2 c^2 (sqrt(1 + (d / c)^2) - 1), which is d^2 for |d| << c and 2 c |d| for |d| >> c.

    Source of huber: Charbonnier et al. 1997, doi:10.1109/83.551699, scaled so that its limit for large c is mse. It is
    computed as 2 d^2 / (1 + sqrt(1 + (d / c)^2)), in which nothing cancels.
    """
    if kind == "mae":
        return difference.abs()
    square = difference.square()
    return square if kind == "mse" else 2 * square / (1 + (1 + square / (huber_c * huber_c)).sqrt())


def sigma_weight(kind: str, sigma: Tensor) -> Tensor:
    """Return the factor of the loss at each noise level, fp32.

    - none: 1.
    - sigma: s, as OneTrainer's SIGMA.
    - sigma_sqrt: 1 / s^2, of Esser et al. 2024, arXiv:2403.03206; the square weighs the error of x0. Bounded by its
      value at LOWEST_SIGMA.
    - cosmap: 2 / (pi (1 - 2 s + 2 s^2)), of the same paper. Its mean over [0, 1] is 1.
    - bell: exp(-2 (s - 1/2)^2) - exp(-1/2), divided by its mean over [0, 1], as ai-toolkit's bell curve.

    Args:
        kind: One of LOSS_WEIGHTINGS in config/training.py.
        sigma: In [0, 1], any shape.
    """
    s = sigma.float()
    if kind == "sigma":
        return s
    if kind == "sigma_sqrt":
        return s.clamp_min(LOWEST_SIGMA).pow(-2)
    if kind == "cosmap":
        return 2 / (math.pi * (1 - 2 * s + 2 * s * s))
    if kind == "bell":
        lowest = math.exp(-0.5)
        mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - lowest
        return ((-2 * (s - 0.5).square()).exp() - lowest) / mean
    assert kind == "none", kind
    return torch.ones_like(s)
