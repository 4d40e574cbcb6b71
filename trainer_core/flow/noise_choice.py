"""Choose the noise of an image from several: the nearest one."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_noise(x0: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Return the one of `count` noises whose angle to the image is the smallest.

    Chroma's training pairs the images and the noises of a large batch so that the sum of their cosine distances is the
    smallest. A LoRA is trained with small batches, so each image chooses from noises of its own instead.

    Args:
        x0: Latents of one image, (C, h, w), fp32, on the CPU.
        count: 1 or more. With 1 the result is the first noise of the generator.
        rng: Generator of the noises, on the CPU.
    Source: Li et al. 2025, arXiv:2505.18521 (nearest of k); Tong et al. 2023, arXiv:2302.00482 (pairs in a batch).
    """
    noises = [torch.randn(x0.shape, generator=rng) for _ in range(count)]
    if count == 1:
        return noises[0]
    image = x0.flatten().double()
    # fp64: the sum of thousands of products in fp32 depends on the number of threads.
    cosines = [float(noise.flatten().double() @ image) / float(noise.double().norm()) for noise in noises]
    return noises[max(range(count), key=cosines.__getitem__)]
