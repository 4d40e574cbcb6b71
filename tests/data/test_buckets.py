"""Geometry of buckets and crops, over many sizes."""

from __future__ import annotations

import math
import random

import pytest
from chroma_trainer.trainer_core.config.dataset import FolderConfig
from chroma_trainer.trainer_core.data.buckets import (
    MAX_ASPECT,
    Placement,
    bucket_of,
    bucket_step,
    is_distorted,
    place,
    target_edge,
)

DRAW = random.Random(1)
SIZES = [(DRAW.randint(1, 6000), DRAW.randint(1, 6000)) for _ in range(150)]
SIZES += [(1, 1), (64, 64), (4000, 17), (17, 4000), (1920, 1080), (1080, 1920), (1, 5000)]
CONFIGS = [
    FolderConfig(resolution=resolution, resolution_type=kind, crop=crop, crop_style=style, crop_aspect=aspect)
    for resolution, kind in ((1024, "pixel_area"), (64, "pixel_area"), (500, "pixel"), (1.0, "area"), (0.25, "area"))
    for crop in (True, False)
    for style in ("center", "random", "corner")
    for aspect in ("preserve", "square")
]


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: f"{c.resolution:g}-{c.resolution_type}-{c.crop}-{c.crop_style}-{c.crop_aspect}"
)
def test_every_placement_is_sound(config):
    step = bucket_step(config)
    for width, height in SIZES:
        placement = place(width, height, config, seed=3, key="0/a.png")
        bucket, resize, (left, top) = placement.bucket, placement.resize, placement.crop
        assert all(edge >= step and edge % step == 0 for edge in bucket)
        assert 0 <= left <= resize[0] - bucket[0] and 0 <= top <= resize[1] - bucket[1]
        if config.crop:  # only one edge is cut; the other fits
            assert bucket[0] == resize[0] or bucket[1] == resize[1]
        elif not is_distorted(width, height, bucket):
            assert resize == bucket


@pytest.mark.parametrize("resolution", [64, 256, 512, 768, 1024])
def test_the_area_is_near_the_targets(resolution):
    config = FolderConfig(resolution=resolution)
    for width, height in SIZES:
        bucket = bucket_of(width, height, config)
        assert 0.75 < bucket[0] * bucket[1] / resolution**2 < 1.34, (width, height, bucket)


def test_the_shape_is_the_nearest_of_all_buckets():
    config = FolderConfig(resolution=1024)
    for width, height in SIZES:
        aspect = min(max(width / height, 1 / MAX_ASPECT), MAX_ASPECT)
        bucket = bucket_of(width, height, config)
        assert abs(math.log(bucket[0] / bucket[1] / aspect)) < 0.2, (width, height, bucket)


def test_turning_the_picture_turns_the_shape():
    config = FolderConfig(resolution=512)
    for width, height in SIZES:
        assert bucket_of(width, height, config) == bucket_of(height, width, config)[::-1]


@pytest.mark.parametrize(
    ("size", "config", "bucket"),
    [
        ((1000, 1000), FolderConfig(resolution=1024), (1024, 1024)),
        ((1920, 1080), FolderConfig(resolution=1024), (1344, 768)),
        ((1920, 1080), FolderConfig(resolution=1.0, resolution_type="area"), (1344, 768)),
        ((1920, 1080), FolderConfig(resolution=512, resolution_type="pixel"), (896, 512)),
        ((1080, 1920), FolderConfig(resolution=512, resolution_type="pixel"), (512, 896)),
        ((1920, 1080), FolderConfig(resolution=512, crop_aspect="square"), (512, 512)),
        ((64, 64), FolderConfig(resolution=64), (64, 64)),
        ((10_000, 100), FolderConfig(resolution=1024), (2048, 512)),
    ],
)  # fmt: skip
def test_known_buckets(size, config, bucket):
    assert bucket_of(*size, config) == bucket


def test_steps():
    assert bucket_step(FolderConfig(resolution=64)) == 16
    assert bucket_step(FolderConfig(resolution=256)) == 64
    assert bucket_step(FolderConfig(resolution=0.01, resolution_type="area")) == 16
    assert bucket_step(FolderConfig(resolution=1024, bucket_step="32")) == 32
    assert target_edge(FolderConfig(resolution=0.25, resolution_type="area")) == 512


def test_a_picture_that_fits_is_not_touched():
    placement = place(1024, 1024, FolderConfig(resolution=1024), 0, "a")
    assert placement == Placement((1024, 1024), (1024, 1024), (0, 0))


def test_center_and_corner():
    config = {"resolution": 64, "crop_aspect": "square"}
    assert place(128, 64, FolderConfig(crop_style="center", **config), 0, "a").crop == (32, 0)
    assert place(128, 64, FolderConfig(crop_style="corner", **config), 0, "a").crop == (0, 0)


def test_a_random_crop_depends_on_seed_and_key_alone():
    config = FolderConfig(resolution=64, crop_style="random", crop_aspect="square")
    crops = [place(640, 64, config, seed, key).crop for seed in range(3) for key in "abcdef"]
    assert crops == [place(640, 64, config, seed, key).crop for seed in range(3) for key in "abcdef"]
    assert len(set(crops)) > 12
    lefts = [place(640, 64, config, 0, str(i)).crop[0] for i in range(400)]
    assert min(lefts) < 20 and max(lefts) > 556 and abs(sum(lefts) / 400 - 288) < 30  # uniform in 0 .. 576


@pytest.mark.parametrize("resolution", [64, 256, 1024])
def test_without_crop_the_aspect_ratio_stays_within_a_quarter(resolution):
    config = FolderConfig(resolution=resolution, crop=False)
    for width, height in (*SIZES, (3000, 300), (300, 3000)):
        if min(width, height) < 16:
            continue  # the resized edge has at least the bucket's pixels
        placement = place(width, height, config, 0, "0/a.png")
        change = placement.resize[0] / placement.resize[1] / (width / height)
        assert 1 / 1.26 < change < 1.26, (width, height, placement)


def test_a_panorama_is_cropped_in_proportion():
    assert place(3000, 300, FolderConfig(resolution=1024, crop=False), 0, "0/a.png") == Placement(
        (2048, 512), (5120, 512), (1536, 0)
    )
