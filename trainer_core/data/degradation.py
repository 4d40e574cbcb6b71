"""Degrade images, to train a model that restores them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter

from ..config.degradation import Step
from ..seeds import generator

SEED = 0  # pairs belong to the dataset: a run with another seed gets the same ones, with their cached latents


def degrade(image: Image.Image, steps: Sequence[Step], *source: int | str) -> Image.Image:
    """Return the image after every step, each with a strength chosen uniformly from its range.

    Args:
        image: RGB, at its training size, so that a strength means the same for every file size.
        steps: Degradations, applied in this order.
        source: Values that seed the strengths.
    """
    for number, step in enumerate(steps):
        draw = generator(SEED, "degrade", *source, number)
        strength = step.low + (step.high - step.low) * torch.rand((), generator=draw, dtype=torch.float64).item()
        image = WAYS[step.kind](image, strength, draw)
    return image


def _jpeg(image: Image.Image, quality: float, draw: torch.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=round(quality))
    with Image.open(file) as reloaded:
        return reloaded.convert("RGB")


def _blur(image: Image.Image, radius: float, draw: torch.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def _noise(image: Image.Image, spread: float, draw: torch.Generator) -> Image.Image:
    """x + 255 spread n, with n standard normal for each color channel of each pixel."""
    normal = torch.randn(image.height, image.width, 3, generator=draw).numpy()
    values = np.asarray(image, dtype=np.float32) + np.float32(255 * spread) * normal
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _shrink(image: Image.Image, times: float, draw: torch.Generator) -> Image.Image:
    small = max(1, round(image.width / times)), max(1, round(image.height / times))
    return image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)


WAYS: dict[str, Callable[[Image.Image, float, torch.Generator], Image.Image]] = {
    "jpeg": _jpeg, "blur": _blur, "noise": _noise, "shrink": _shrink,
}  # fmt: skip
