"""The straight path from an image to noise."""

from __future__ import annotations

from torch import Tensor


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return the point on the straight path, and its velocity.

    x_sigma = (1 - sigma) x0 + sigma noise,   v = noise - x0

    Args:
        x0: Clean latents, (B, C, H, W).
        noise: Standard normal, same shape.
        sigma: In [0, 1], (B,), fp32; 1 is pure noise.
    Returns:
        x_sigma and v, (B, C, H, W), in the dtype of x0 and noise (fp32 with fp32 sigma unless both are fp64).
    Source: Liu et al. 2022, arXiv:2209.03003.
    """
    s = sigma.view(-1, *[1] * (x0.ndim - 1))
    return (1 - s) * x0 + s * noise, noise - x0
