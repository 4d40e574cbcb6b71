"""Choose the size each image is trained at, and the part of it that is used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from ..config.dataset import FolderConfig
from ..seeds import generator

FINE_STEP, USUAL_STEP, SMALL_EDGE = 16, 64, 256
MAX_ASPECT = 4.0  # buckets from 1:4 to 4:1
MAX_DISTORTION = 1.25  # factor by which an image's aspect ratio may change without a crop


@dataclass(frozen=True)
class Placement:
    """How an image becomes its bucket: resize, then crop.

    Attributes:
        bucket: (width, height) of the image that is trained on, in pixels.
        resize: (width, height) of the whole image before the crop.
        crop: (left, top) of the bucket in the resized image.
    """

    KEY: ClassVar = ("Placement", "bucket", "resize", "crop")

    bucket: tuple[int, int]
    resize: tuple[int, int]
    crop: tuple[int, int]


def bucket_step(config: FolderConfig) -> int:
    """Return the number of pixels that bucket edges are multiples of.

    With "auto" this is 64, or 16 where images are smaller than 256 px.
    """
    if config.bucket_step != "auto":
        return int(config.bucket_step)
    return FINE_STEP if target_edge(config) < SMALL_EDGE else USUAL_STEP


def target_edge(config: FolderConfig) -> float:
    """Return the edge, in pixels, of a square with the area that images are trained at ("pixel": the shorter edge)."""
    return 1024 * math.sqrt(config.resolution) if config.resolution_type == "area" else config.resolution


@lru_cache(maxsize=4096)
def bucket_of(width: int, height: int, config: FolderConfig) -> tuple[int, int]:
    """Return the bucket nearest to the image's aspect ratio.

    - pixel_area, area: of all (w, h) in steps whose area is at most about the target's, the one with the nearest
      aspect ratio.
    - pixel: the shorter edge is the resolution; the longer edge follows the aspect ratio.
    """
    step, edge = bucket_step(config), target_edge(config)
    square = max(step, round(edge / step) * step)
    if config.crop and config.crop_aspect == "square":
        return square, square
    aspect = min(max(width / height, 1 / MAX_ASPECT), MAX_ASPECT)
    if config.resolution_type == "pixel":
        longer = max(step, round(square * max(aspect, 1 / aspect) / step) * step)
        return (longer, square) if aspect >= 1 else (square, longer)
    return min(_buckets(edge, step), key=lambda size: (abs(math.log(size[0] / size[1] / aspect)), -size[0] * size[1]))


@lru_cache(maxsize=64)
def _buckets(edge: float, step: int) -> tuple[tuple[int, int], ...]:
    """Return every bucket with an aspect ratio of up to 1:4.

    For each width this is the height that brings the area nearest to edge^2, and the same turned by 90 degrees.
    """
    sizes = set()
    for width in range(step, int(edge * math.sqrt(MAX_ASPECT)) + step, step):
        height = max(step, round(edge * edge / width / step) * step)
        if 1 / MAX_ASPECT <= width / height <= MAX_ASPECT:
            sizes |= {(width, height), (height, width)}
    square = max(step, round(edge / step) * step)
    return tuple(sorted(sizes)) or ((square, square),)


def place(width: int, height: int, config: FolderConfig, seed: int, key: str) -> Placement:
    """Return how an image of (width, height) is resized and cropped.

    A random crop is chosen once per image, by (seed, key), because its latent is cached. Without a crop, the whole image
    is resized to its bucket, unless that would distort it too much.
    """
    bucket = bucket_of(width, height, config)
    if not config.crop and not is_distorted(width, height, bucket):
        return Placement(bucket, bucket, (0, 0))
    scale = max(bucket[0] / width, bucket[1] / height)
    resize = max(bucket[0], round(width * scale)), max(bucket[1], round(height * scale))
    spare = resize[0] - bucket[0], resize[1] - bucket[1]
    if config.crop_style == "corner":
        return Placement(bucket, resize, (0, 0))
    if config.crop_style == "center":
        return Placement(bucket, resize, (spare[0] // 2, spare[1] // 2))
    draw = generator(seed, "crop", key)
    left, top = (int(torch.randint(room + 1, (), generator=draw).item()) for room in spare)
    return Placement(bucket, resize, (left, top))


def is_distorted(width: int, height: int, bucket: tuple[int, int]) -> bool:
    """Return whether resizing a whole image to the bucket would change its aspect ratio by more than the bound."""
    factor = width * bucket[1] / (height * bucket[0])
    return max(factor, 1 / factor) > MAX_DISTORTION
