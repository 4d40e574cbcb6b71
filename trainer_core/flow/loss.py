"""What is minimised: the squared distance between two velocities."""

from __future__ import annotations

import torch
from torch import Tensor


def velocity_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, in fp32.

    loss_b = mean((v_hat - v)^2),   with weights: mean(w (v_hat - v)^2) / mean(w)

    Dividing by the mean weight keeps the loss of a small mask on the scale of a full picture's.

    Args:
        prediction: velocity the model gives, (B, C, H, W), any float dtype.
        target: velocity of the path, same shape.
        weight: not negative, any shape that broadcasts to (B, C, H, W), such as a mask (B, 1, H, W). A sample whose
            weights are all 0 has loss 0.
    Returns:
        (B,), fp32.
    """
    error = (prediction.float() - target.float()).square().flatten(1)
    if weight is None:
        return error.mean(1)
    w = weight.float().expand(prediction.shape).flatten(1)
    return (w * error).sum(1) / w.sum(1).clamp_min(torch.finfo(torch.float32).tiny)
