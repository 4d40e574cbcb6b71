"""Choose the size each image is trained at, and the part of it that is used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from ..config.dataset import LARGEST_ASPECT, FolderConfig
from ..seeds import generator
from .tables.caption_row import Box

FINE_STEP, USUAL_STEP, SMALL_EDGE = 16, 64, 256
MAX_ASPECT = LARGEST_ASPECT  # buckets from 1:4 to 4:1
MAX_DISTORTION = 1.25  # factor by which an image's aspect ratio may change without a crop


@dataclass(frozen=True)
class Placement:
    """How an image becomes its bucket: resize, then crop.

    Attributes:
        bucket: (width, height) of the image that is trained on, in pixels.
        resize: (width, height) of the whole image before the crop.
        crop: (left, top) of the bucket in the resized image.
    """

    KEY: ClassVar[tuple[str, ...]] = ("Placement", "bucket", "resize", "crop")

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
def bucket_of(width: float, height: float, config: FolderConfig) -> tuple[int, int]:
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


def place(width: int, height: int, config: FolderConfig, seed: int, key: str, box: Box | None = None) -> Placement:
    """Return how an image of (width, height) is resized and cropped.

    A random crop or aspect ratio is chosen once per image, by (seed, key), because its latent is cached. Without a
    crop, the whole image is resized to its bucket, unless that would distort it too much.

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        config: The settings of its folder.
        seed: Of the run.
        key: Of the image.
        box: What a crop by boxes or by the mask keeps in its middle; None: the middle of the image.
    """
    bucket = bucket_of(*_shape_of(width, height, config, seed, key), config)
    if not config.crop and not is_distorted(width, height, bucket):
        return Placement(bucket, bucket, (0, 0))
    scale = max(bucket[0] / width, bucket[1] / height)
    resize = max(bucket[0], round(width * scale)), max(bucket[1], round(height * scale))
    spare = resize[0] - bucket[0], resize[1] - bucket[1]
    if config.crop_style == "corner":
        return Placement(bucket, resize, (0, 0))
    if config.crop_style == "random":
        draw = generator(seed, "crop", key)
        left, top = (int(torch.randint(room + 1, (), generator=draw).item()) for room in spare)
        return Placement(bucket, resize, (left, top))
    if box is None:  # center, and where there are no boxes
        return Placement(bucket, resize, (spare[0] // 2, spare[1] // 2))
    left = _start(box[0] * resize[0] / width, box[2] * resize[0] / width, bucket[0], spare[0])
    top = _start(box[1] * resize[1] / height, box[3] * resize[1] / height, bucket[1], spare[1])
    return Placement(bucket, resize, (left, top))


def _start(low: float, high: float, length: int, spare: int) -> int:
    """Return where a crop of this length starts, so that low to high is in its middle as far as the image allows."""
    return min(max(round((low + high - length) / 2), 0), spare)


def _shape_of(width: int, height: int, config: FolderConfig, seed: int, key: str) -> tuple[float, float]:
    """Return a width and height with the aspect ratio that the image is cropped to."""
    if not (config.crop and config.takes_aspects):
        return width, height
    aspects = config.aspect_ratios()
    if config.crop_aspect == "closest":
        return min(aspects, key=lambda aspect: abs(math.log(aspect * height / width))), 1.0
    index = torch.randint(len(aspects), (), generator=generator(seed, "aspect", key))
    return aspects[int(index.item())], 1.0


def is_distorted(width: int, height: int, bucket: tuple[int, int]) -> bool:
    """Return whether resizing a whole image to the bucket would change its aspect ratio by more than the bound."""
    factor = width * bucket[1] / (height * bucket[0])
    return max(factor, 1 / factor) > MAX_DISTORTION
