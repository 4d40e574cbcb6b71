"""Reference images: each shows the same part of its image as its target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.data.cache.latents import cache_latents, place_image
from chroma_trainer.trainer_core.data.dataset import build_index
from chroma_trainer.trainer_core.data.reference_images import find_references
from chroma_trainer.trainer_core.data.source.decode import decode
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.storage.tensor_store import Store
from PIL import Image


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    folder = tmp_path / "starts"
    folder.mkdir()
    return folder


def config_of(pictures, starts: Path, **values) -> DatasetConfig:
    return replace(pictures.config(references=starts.name, **values), reference_roots=(str(starts),))


@pytest.mark.parametrize(
    "values",
    [
        {"crop_style": "corner", "crop_aspect": "square"},
        {"crop_style": "random", "crop_aspect": "square"},
        {"crop_style": "center", "crop_aspect": "square"},
        {"crop_style": "random"},
        {"crop": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1, 2])
def test_a_reference_of_its_targets_shape_is_cropped_as_its_target(pictures, host, starts, values, scale):
    pictures("a.png")
    image = Image.linear_gradient("L").resize((150, 80))
    image = Image.merge("RGB", (image, Image.linear_gradient("L").rotate(90).resize((150, 80)), image))
    image.save(pictures.folder / "a.png")
    image.resize((150 * scale, 80 * scale), Image.Resampling.BICUBIC).save(starts / "a.png")
    config = config_of(pictures, starts, **values)
    index = build_index(config, host, 3)
    references = find_references(index, config)
    (target,) = index.samples
    start = references.of(target)
    parts = [
        place_image(decode(source.read(sample)), sample)
        for source, sample in ((index, target), (references.index, start))
    ]
    difference = int(np.abs(np.subtract(*(np.asarray(part, np.int16) for part in parts))).max())
    assert parts[0].size == parts[1].size and difference <= (0 if scale == 1 else 12)


def test_a_reference_of_another_shape_is_cropped_around_its_middle(pictures, host, starts):
    pictures("a.png", (150, 80))
    Image.new("RGB", (80, 80)).save(starts / "a.png")
    config = config_of(pictures, starts, crop_style="corner", crop_aspect="square", resolution=64)
    index = build_index(config, host, 0)
    placement = find_references(index, config).of(index.samples[0]).placement
    assert (
        placement.bucket == index.samples[0].placement.bucket
        and placement.crop == (0, 0) == (placement.resize[0] - 64,) * 2
    )


def test_two_references_of_one_name_are_one_clear_problem(pictures, host, starts):
    pictures("a.png")
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (64, 64), 9).save(starts / name)
    config = config_of(pictures, starts)
    with pytest.raises(UserError, match=r"references: 'starts' has two images named a, one of them a\.png; remove one"):
        find_references(build_index(config, host, 0), config)


class Codec:
    def encode(self, pixels):
        return torch.nn.functional.avg_pool2d(pixels, 8)


@pytest.mark.parametrize("degrade", ["", "jpeg 40"])
def test_a_reference_that_was_replaced_is_not_stored_under_the_hash_of_what_was_there(
    pictures, host, starts, tmp_path, degrade
):
    for shade, name in enumerate(("a.png", "b.png")):
        pictures(name)
        for folder in (pictures.folder, starts):
            Image.new("RGB", (150, 80), (9, 9, shade)).save(folder / name)
    config = pictures.config(degrade=degrade) if degrade else config_of(pictures, starts)
    index = build_index(config, host, 0)
    references = find_references(index, config)
    cache_latents(references.index, "id", Codec, Store(tmp_path / "unchanged"), host, change=references)
    Image.new("RGB", (150, 80), (7, 8, 9)).save((pictures.folder if degrade else starts) / "b.png")
    with pytest.raises(UserError, match=r"b\.png was replaced or edited while the run was starting"):
        cache_latents(references.index, "id", Codec, Store(tmp_path / "store"), host, change=references)
