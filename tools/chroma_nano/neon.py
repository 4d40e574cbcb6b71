"""Neon: the edges of a picture, in bright saturated colour, glowing on near-black."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageFilter

BACKGROUND = np.float32([8, 6, 20])
GREY_HUE = 0.5  # cyan, for parts without a colour of their own
EDGE = (0.10, 0.45)  # gradient where a line begins, and where it is at full light


def neon(rgba: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 -> (H, W, 3) uint8.

    Edges are where a Sobel filter over colour and alpha answers; a line takes the hue of what it outlines at full
    saturation, white at its heart, and throws a soft glow.
    """
    edges = find_edges(rgba)
    line = np.asarray(Image.fromarray(np.uint8(edges * 255)).filter(ImageFilter.GaussianBlur(0.6)), np.float32) / 255
    glow = np.asarray(Image.fromarray(np.uint8(edges * 255)).filter(ImageFilter.GaussianBlur(3)), np.float32) / 255
    colour = vivid(rgba)
    light = np.clip(1.25 * line, 0, 1)[..., None] * colour + 0.55 * glow[..., None] * colour
    heart = np.clip(line - 0.75, 0, 1)[..., None] * 0.6
    return np.uint8(np.clip(BACKGROUND + 255 * (light + heart), 0, 255))


def find_edges(rgba: np.ndarray) -> np.ndarray:
    """How much of a line each pixel is, (H, W) in [0, 1]."""
    picture = rgba.astype(np.float32) / 255
    picture[..., :3] *= picture[..., 3:]
    return np.clip((_gradient(picture) - EDGE[0]) / (EDGE[1] - EDGE[0]), 0, 1)


def _gradient(picture: np.ndarray) -> np.ndarray:
    """Largest Sobel magnitude over the channels, (H, W), about 1 at a full step."""
    p = np.pad(picture, ((1, 1), (1, 1), (0, 0)))
    dx = (p[:-2, 2:] + 2 * p[1:-1, 2:] + p[2:, 2:]) - (p[:-2, :-2] + 2 * p[1:-1, :-2] + p[2:, :-2])
    dy = (p[2:, :-2] + 2 * p[2:, 1:-1] + p[2:, 2:]) - (p[:-2, :-2] + 2 * p[:-2, 1:-1] + p[:-2, 2:])
    return np.sqrt(dx**2 + dy**2).max(-1) / 4


def vivid(rgba: np.ndarray) -> np.ndarray:
    """The local hue at full saturation, (H, W, 3) in [0, 1], spread outwards past the drawing's rim."""
    weight = rgba[..., 3].astype(np.float32) / 255
    blur = ImageFilter.GaussianBlur(2.5)
    parts = [Image.fromarray(np.uint8(rgba[..., c] * weight)).filter(blur) for c in range(3)]
    spread = np.maximum(np.asarray(Image.fromarray(np.uint8(255 * weight)).filter(blur), np.float32), 1)
    local = np.clip(np.stack([np.asarray(p, np.float32) for p in parts], -1) / spread[..., None], 0, 1)
    out = np.empty_like(local)
    for y, x in np.ndindex(local.shape[:2]):
        hue, saturation, _ = colorsys.rgb_to_hsv(*local[y, x])
        out[y, x] = colorsys.hsv_to_rgb(hue if saturation > 0.2 else GREY_HUE, 1, 1)
    return out
