"""Has a picture the style? Colour statistics that can say no: numpy alone, no model, no randomness.

The style of the demo (assets/neon-emoji) is bright saturated lines on near-black. Plain emoji stand on white.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

DARK = 0.30  # brightest channel of a near-black pixel, at most
BRIGHT = 0.65  # brightest channel of a lit line, at least
SATURATED = 0.50  # (max - min) / max of a lit line, at least
LIT_SHARE = 0.03  # of all pixels: lines of at least this share count in full
DARK_SHARE = 0.30  # of all pixels: so much darkness counts in full
RIM = 16  # the rim is a 16th of the picture's shorter edge wide


def style_score(image: np.ndarray) -> float:
    """How neon a picture is.

    score = rim * min(1, dark / 0.3) * min(1, lit / 0.03)

    dark, lit: shares of near-black and of bright saturated pixels; rim: share of near-black pixels along the picture's edges,
    where drawings on white have none, however black the subject is.

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
    """Share of pictures whose score reaches the threshold (see style.json beside the dataset); 0 of none."""
    scores = [style_score(image) for image in images]
    return sum(score >= threshold for score in scores) / max(1, len(scores))
