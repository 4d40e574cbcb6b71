"""Which size each picture is trained at, and which part of it is seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..config.dataset import FolderConfig
from ..seeds import generator

FINE_STEP, USUAL_STEP, SMALL_EDGE = 16, 64, 256
MAX_ASPECT = 4.0  # buckets from 1:4 to 4:1


@dataclass(frozen=True)
class Placement:
    """How a picture becomes its bucket: resize, then crop.

    Args:
        bucket: (width, height) that is trained, in pixels.
        resize: (width, height) of the whole picture before the crop.
        crop: (left, top) of the bucket in the resized picture.
    """

    bucket: tuple[int, int]
    resize: tuple[int, int]
    crop: tuple[int, int]

    @property
    def is_cropped(self) -> bool:
        return self.bucket != self.resize


def bucket_step(config: FolderConfig) -> int:
    """Bucket edges are multiples of this: as set, or 64, and 16 where pictures are smaller than 256 px."""
    if config.bucket_step != "auto":
        return int(config.bucket_step)
    return FINE_STEP if target_edge(config) < SMALL_EDGE else USUAL_STEP


def target_edge(config: FolderConfig) -> float:
    """Edge of the square whose area pictures are trained at (pixel: of the shorter edge), in pixels."""
    return 1024 * math.sqrt(config.resolution) if config.resolution_type == "area" else config.resolution


@lru_cache(maxsize=4096)
def bucket_of(width: int, height: int, config: FolderConfig) -> tuple[int, int]:
    """The bucket nearest to the picture's shape.

    pixel_area, area: of all (w, h) in steps whose area is at most about the target's, the one of the nearest aspect ratio.
    pixel: the shorter edge is the resolution, the longer follows the aspect ratio.
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
    """Every width, with the height that brings the area nearest to edge^2, and each turned by 90 degrees; of aspects up to 1:4."""
    found = set()
    for width in range(step, int(edge * math.sqrt(MAX_ASPECT)) + step, step):
        height = max(step, round(edge * edge / width / step) * step)
        if 1 / MAX_ASPECT <= width / height <= MAX_ASPECT:
            found |= {(width, height), (height, width)}
    square = max(step, round(edge / step) * step)
    return tuple(sorted(found)) or ((square, square),)


def place(width: int, height: int, config: FolderConfig, seed: int, key: str) -> Placement:
    """How a (width, height) picture is trained. A random crop is drawn once for each picture, by (seed, key): its latent is cached."""
    bucket = bucket_of(width, height, config)
    if not config.crop:
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
