"""A part of an image that a crop keeps."""

from __future__ import annotations

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the upright image
