"""The training loss: the squared distance between two velocities."""

from __future__ import annotations

import torch
from torch import Tensor


def velocity_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean squared error of each sample, in fp32.

    loss_b = mean((v_hat - v)^2),   with weights: mean(w (v_hat - v)^2) / mean(w)

    Dividing by the mean weight keeps the loss of a small mask on the same scale as that of a whole image.

    Args:
        prediction: Velocity predicted by the model, (B, C, H, W), any float dtype.
        target: Velocity of the path, same shape.
        weight: Non-negative, of any shape that broadcasts to (B, C, H, W), such as a mask (B, 1, H, W). A sample whose
            weights are all 0 has loss 0.
    Returns:
        (B,), fp32.
    """
    error = (prediction.float() - target.float()).square().flatten(1)
    if weight is None:
        return error.mean(1)
    w = weight.float().expand(prediction.shape).flatten(1)
    return (w * error).sum(1) / w.sum(1).clamp_min(torch.finfo(torch.float32).tiny)
