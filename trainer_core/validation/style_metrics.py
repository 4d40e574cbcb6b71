"""Measure whether an image has the demo's style, with color statistics: numpy only, no model, deterministic.

The style of the demo (assets/neon-emoji) is bright saturated lines on near-black. Ordinary emoji are on white.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

DARK = 0.30  # near-black pixel: maximum of its brightest channel
BRIGHT = 0.65  # lit pixel: minimum of its brightest channel
SATURATED = 0.50  # lit pixel: minimum of (max - min) / max
LIT_SHARE = 0.03  # share of lit pixels that scores in full
DARK_SHARE = 0.30  # share of near-black pixels that scores in full
RIM = 16  # the rim is 1/16 of the shorter edge wide


def style_score(image: np.ndarray) -> float:
    """Return how neon an image is.

    score = rim * min(1, dark / 0.3) * min(1, lit / 0.03)

    dark and lit are the shares of near-black and of bright saturated pixels. rim is the share of near-black pixels
    along the image's edges, where drawings on white have none, however black the subject is.

    Args:
        image: (H, W, 3), uint8.
    Returns:
        In [0, 1]: about 0 for a drawing on white, for a plain area and for noise; near 1 for neon outlines.
    """
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8, (image.shape, image.dtype)
    pixels = image.astype(np.float64) / 255
    high, low = pixels.max(-1), pixels.min(-1)
    dark = high <= DARK
    lit = (high >= BRIGHT) & (high - low >= SATURATED * high)
    width = max(1, min(dark.shape) // RIM)
    is_rim = np.ones_like(dark)
    is_rim[width:-width, width:-width] = False
    return float(dark[is_rim].mean() * min(1.0, dark.mean() / DARK_SHARE) * min(1.0, lit.mean() / LIT_SHARE))


def fraction_in_style(images: Iterable[np.ndarray], threshold: float) -> float:
    """Return the share of images whose score reaches the threshold (see the dataset's style.json), or 0 if none."""
    scores = [style_score(image) for image in images]
    return sum(score >= threshold for score in scores) / max(1, len(scores))
