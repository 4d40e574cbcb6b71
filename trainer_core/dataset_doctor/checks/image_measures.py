"""Measure an image at its training size: detail, brightness, and what identifies a copy of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from ..thresholds import FLAT_LEVELS

HASH_EDGE, HASH_SIDE = 32, 8  # pixels that are transformed, and low frequencies along each axis that are compared
THUMB_EDGE = 16
LOW, HIGH = 0.01, 0.99  # percentiles of the brightness


@dataclass(frozen=True)
class Measures:
    """What was measured of an image.

    Attributes:
        detail: Contrast of the finest octave relative to the next ones, see `detail_of`; None if the image is flat.
        dark: 1st percentile of the brightness, 0 to 255.
        bright: 99th percentile.
        hash: The 63 bits of its low frequencies, as +1 and -1.
        mirrored_hash: Those of the mirrored image.
        thumb: The image at 16 x 16 pixels, RGB.
    """

    detail: float | None
    dark: int
    bright: int
    hash: np.ndarray
    mirrored_hash: np.ndarray
    thumb: np.ndarray


def measure(image: Image.Image) -> Measures:
    """Return the measures of an image at its training size."""
    gray = image.convert("L")
    dark, bright = _percentiles(gray.histogram())
    bits, mirrored = _hashes(gray)
    thumb = np.asarray(image.resize((THUMB_EDGE, THUMB_EDGE), Image.Resampling.BOX))
    return Measures(detail_of(gray), dark, bright, bits, mirrored, thumb)


def detail_of(gray: Image.Image) -> float | None:
    """Return the contrast of the finest octave relative to the stronger of the next two; None for a flat image.

    An octave is what is lost when the image is made half as large and large again (a Laplacian pyramid, with Lanczos
    filters). An image that was enlarged twice has next to nothing in the finest octave, and a blurry one little. Two
    octaves are compared, because a very blurry image has nothing in the second one either.
    """
    level, contrasts = gray.convert("F"), []
    for _ in range(3):
        half = level.resize((max(1, level.width // 2), max(1, level.height // 2)), Image.Resampling.LANCZOS)
        lost = np.asarray(level) - np.asarray(half.resize(level.size, Image.Resampling.LANCZOS))
        contrasts.append(float(np.sqrt(np.mean(np.square(lost, dtype=np.float64)))))
        level = half
    coarse = max(contrasts[1:])
    return contrasts[0] / coarse if coarse >= FLAT_LEVELS else None


def _percentiles(histogram: list[int]) -> tuple[int, int]:
    below = np.cumsum(histogram) / max(1, sum(histogram))
    return int(np.searchsorted(below, LOW)), int(np.searchsorted(below, HIGH))


def _hashes(gray: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return the signs of the low frequencies around their median, of the image and of its mirror image.

    The mirror image has the same frequencies, with the sign of every odd one along the width turned.
    """
    small = np.asarray(gray.resize((HASH_EDGE, HASH_EDGE), Image.Resampling.LANCZOS), dtype=np.float64)
    basis = _cosines()
    waves = basis @ small @ basis.T
    turned = waves * np.where(np.arange(HASH_SIDE) % 2, -1.0, 1.0)
    return _signs(waves), _signs(turned)


def _signs(waves: np.ndarray) -> np.ndarray:
    values = waves.reshape(-1)[1:]  # the first is the mean
    return np.where(values > np.median(values), 1, -1).astype(np.int8)


@cache
def _cosines() -> np.ndarray:
    """Return the first rows of the discrete cosine transform (type II)."""
    k, n = np.arange(HASH_SIDE)[:, None], np.arange(HASH_EDGE)
    return np.cos(np.pi * (2 * n + 1) * k / (2 * HASH_EDGE))
