"""Pictures made worse: what the line of text says, and that the same picture is always made worse in the same way."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.config.degradation import Step, steps_of
from chroma_trainer.trainer_core.data.cache.latents import latent_key
from chroma_trainer.trainer_core.data.dataset import build_index
from chroma_trainer.trainer_core.data.degradation import degrade
from chroma_trainer.trainer_core.data.reference_images import find_references
from chroma_trainer.trainer_core.plots.crop_sheet import GAP
from chroma_trainer.trainer_core.plots.pair_sheet import CELL, draw_pair_sheet
from PIL import Image, ImageFilter


@pytest.fixture
def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(60, 196, (48, 64, 3))
    return Image.fromarray(values.astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def worse(image: Image.Image, text: str, source: str = "a") -> np.ndarray:
    made = degrade(image, steps_of(text), source)
    assert made.size == image.size and made.mode == "RGB"
    return pixels(made)


def test_the_line_is_read():
    assert steps_of("  ") == ()
    assert steps_of("shrink 4+JPEG 20 - 40") == (Step("shrink", 4, 4), Step("jpeg", 20, 40))
    assert steps_of("noise .02-0.1") == (Step("noise", 0.02, 0.1),)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("jpg 10", "'jpg 10' is not a valid degradation; write jpeg 10-30, blur 1-3"),
        ("jpeg", "'jpeg' is not a valid degradation"),
        ("jpeg 10 + ", "'' is not a valid degradation"),
        ("jpeg 10, blur 2", "'jpeg 10, blur 2' is not a valid degradation"),
        ("blur -3", "'blur -3' is not a valid degradation"),
        ("jpeg 30-10", "'jpeg 30-10' has the larger number first; write jpeg 10-30"),
        ("jpeg 10-200", "out of range: jpeg takes a JPEG quality, a whole number, from 1 to 95"),
        ("jpeg 10.5", "out of range"),
        ("noise 5", "noise takes a noise standard deviation as a share of white, from 0.001 to 1"),
        ("shrink 0.5", "out of range"),
    ],
)
def test_what_cannot_be_read_is_one_clear_problem(text, told):
    (problem,) = FolderConfig(degrade=text).problems()
    assert problem.field == "degrade" and told in problem.message


def test_it_excludes_references():
    (problem,) = FolderConfig(degrade="blur 2", references="starts").problems()
    assert problem.field == "degrade" and "references is set to a folder" in problem.message


def test_each_way_does_what_it_says(picture):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=20)
    assert np.array_equal(worse(picture, "jpeg 20"), pixels(Image.open(file)))
    assert np.array_equal(worse(picture, "blur 2"), pixels(picture.filter(ImageFilter.GaussianBlur(2))))
    assert np.array_equal(worse(picture, "shrink 1"), pixels(picture))
    small = picture.resize((16, 12), Image.Resampling.BICUBIC)
    assert np.array_equal(worse(picture, "shrink 4"), pixels(small.resize((64, 48), Image.Resampling.BICUBIC)))
    noise = worse(picture, "noise 0.05") - pixels(picture)
    assert abs(noise.std() - 0.05 * 255) < 0.4 and abs(noise.mean()) < 0.5
    chained = degrade(degrade(picture, steps_of("blur 2"), "x"), steps_of("jpeg 20"), "x")
    assert np.array_equal(worse(picture, "blur 2 + jpeg 20"), pixels(chained))


def test_strengths_fill_their_range(picture):
    spreads = [(worse(picture, "noise 0.02-0.1", str(i)) - pixels(picture)).std() / 255 for i in range(40)]
    assert 0.019 < min(spreads) < 0.03 and 0.09 < max(spreads) < 0.101


def test_the_same_picture_is_made_worse_alike(picture):
    text = "jpeg 10-30 + noise 0.02-0.1"
    torch.manual_seed(1)
    first = worse(picture, text)
    torch.manual_seed(2)
    assert np.array_equal(first, worse(picture, text))
    assert not np.array_equal(first, worse(picture, text, "b"))


def parts(config: DatasetConfig, *texts: str) -> DatasetConfig:
    """The folder chained once for each text."""
    chained = tuple(replace(config.parts[0], degrade=text) for text in texts)
    return DatasetConfig(chained, config.roots * len(texts), ("",) * len(texts))


def keys(config: DatasetConfig, host, seed: int = 0) -> list[str]:
    references = find_references(build_index(config, host, seed), config)
    return [latent_key(start, "codec") for start in references.index.samples]


def test_latents_are_named_by_picture_and_degradation(pictures, host):
    for name in "ab":
        pictures(f"{name}.png", shade=30 + 100 * (name == "b"))
    config = pictures.config()
    first = keys(parts(config, "jpeg 10-30"), host)
    assert len(set(first)) == 2
    assert keys(parts(config, " JPEG 10 - 30"), host, seed=7) == first
    assert not set(first) & set(keys(parts(config, "jpeg 10-31"), host))
    own = {latent_key(sample, "codec") for sample in build_index(config, host, 0).samples}
    assert not own & set(first)
    other, twice = (
        keys(parts(config, "blur 2", "jpeg 10-30"), host),
        keys(parts(config, "jpeg 10-30", "jpeg 10-30"), host),
    )
    assert other[2:] == first == twice[:2]  # wherever a folder stands in the chain
    assert not set(twice[:2]) & set(twice[2:])  # once more: other strengths


def test_parts_with_and_without_a_folder_of_references(pictures, host, tmp_path):
    pictures("a.png")
    starts = tmp_path / "starts"
    starts.mkdir()
    Image.new("RGB", (30, 40), (9, 8, 7)).save(starts / "a.jpg")
    config = replace(parts(pictures.config(), "", "shrink 4"), reference_roots=(str(starts), ""))
    index = build_index(config, host, 0)
    references = find_references(index, config)
    given, made = (references.of(sample) for sample in index.samples)
    assert given.name == "a.jpg" and made.name == "a.png" and made.sha256 != index.samples[1].sha256
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    assert references.change(image, given) is image
    assert np.array_equal(pixels(references.change(image, made)), worse(image, "shrink 4"))


def test_the_sheet_shows_the_start_beside_its_target(pictures, host, tmp_path):
    pictures("a.png", (640, 640))
    for resolution, columns in ((64, 2), (512, 4)):
        config = parts(pictures.config(resolution=resolution), "noise 0.2")
        index = build_index(config, host, 0)
        draw_pair_sheet(index, find_references(index, config), tmp_path / "pairs.png")
        with Image.open(tmp_path / "pairs.png") as page:
            assert page.size == (columns * (CELL + GAP) + GAP, CELL + 2 * GAP)
            corner = [
                page.crop((x, CELL // 2, x + 60, CELL // 2 + 60))
                for x in (2 * GAP + CELL * i + GAP * i + 200 for i in range(2))
            ]
            start, target = (pixels(image)[..., 0] for image in corner)
            assert np.abs(np.diff(start, axis=0)).mean() > 3 * np.abs(np.diff(target, axis=0)).mean()
