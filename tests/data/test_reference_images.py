"""Reference images: each is placed as its target is, so that a pair shows the same part of the picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from chroma_trainer.trainer_core.data.cache.latents import place_image
from chroma_trainer.trainer_core.data.dataset import build_index
from chroma_trainer.trainer_core.data.reference_images import find_references
from chroma_trainer.trainer_core.data.source.decode import decode
from PIL import Image

SIZES = [(80, 60), (61, 150), (300, 280), (90, 100)]


def slope(size: tuple[int, int]) -> Image.Image:
    """A picture whose colors are the place: red from left to right, green from top to bottom."""
    red, green = (np.linspace(0, 255, edge) for edge in size)
    values = np.stack([*np.broadcast_arrays(red[None], green[:, None]), np.zeros(size[::-1])], axis=-1)
    return Image.fromarray(values.round().astype(np.uint8))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"crop": False},
        {"crop_style": "corner"},
        {"crop_style": "random", "crop_aspect": "square"},
        {"crop_style": "corner", "crop_aspect": "closest", "aspects": "3:1"},
    ],
)
def test_a_reference_lies_where_its_target_does(pictures, host, values):
    """The same picture, in half the size, or in one and a half times the size."""
    folder = pictures.folder.parent / "starts"
    folder.mkdir()
    for i, (width, height) in enumerate(SIZES):
        factor = 0.5 if i % 2 else 1.5
        pictures(f"{i}.png", (8, 8))  # with its caption
        slope((width, height)).save(pictures.folder / f"{i}.png")
        slope((round(width * factor), round(height * factor))).save(folder / f"{i}.png")
    config = pictures.config(**values)
    parts = tuple(replace(part, references="starts") for part in config.parts)
    config = replace(config, parts=parts, reference_roots=(str(folder),) * len(parts))
    index = build_index(config, host, 3)
    references = find_references(index, config)
    assert len(index.samples) == len(SIZES)
    for sample in index.samples:
        start = references.of(sample)
        target = np.asarray(place_image(decode(index.read(sample)), sample), np.float32)
        beside = np.asarray(place_image(decode(references.index.read(start)), start), np.float32)
        assert np.abs(target - beside).max() <= 12  # of 255: pixels of the smaller picture are as large


def test_a_reference_of_another_shape_is_cropped_around_its_middle(pictures, host):
    folder = pictures.folder.parent / "starts"
    folder.mkdir()
    pictures("0.png", (80, 60))
    slope((100, 100)).save(folder / "0.png")
    config = pictures.config(crop_style="corner")
    parts = tuple(replace(part, references="starts") for part in config.parts)
    config = replace(config, parts=parts, reference_roots=(str(folder),) * len(parts))
    index = build_index(config, host, 0)
    placement = find_references(index, config).of(index.samples[0]).placement
    width, height = placement.bucket
    assert placement.bucket == index.samples[0].placement.bucket and min(placement.resize) == max(placement.bucket)
    assert placement.crop == ((placement.resize[0] - width) // 2, (placement.resize[1] - height) // 2)
