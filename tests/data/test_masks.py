"""Masks: found by name, read once, and placed as their pictures are."""

from __future__ import annotations

import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.data.cache.latents import place_image
from chroma_trainer.trainer_core.data.cache.masks import cache_masks
from chroma_trainer.trainer_core.data.dataset import Unreadable, build_index
from chroma_trainer.trainer_core.data.masks import is_same_shape
from chroma_trainer.trainer_core.data.source.decode import decode
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Notice
from chroma_trainer.trainer_core.plots.crop_sheet import CELL, GAP, draw_crop_sheet
from chroma_trainer.trainer_core.storage.tensor_store import Store
from PIL import Image

from tests.narrowing import present

EXIF_ORIENTATION, TURNED_LEFT = 0x0112, 6


@pytest.fixture
def masks(pictures):
    """Four pictures, and a folder for their masks beside theirs."""
    folder = pictures.folder.parent / "masks"
    folder.mkdir()
    for i in range(4):
        pictures(f"{i}.png", (80, 60), shade=i)
    return folder


def with_masks(config: DatasetConfig, folder: Path) -> DatasetConfig:
    parts = tuple(replace(part, masks="masks") for part in config.parts)
    return replace(config, parts=parts, mask_roots=(str(folder),) * len(parts))


def half(size=(80, 60), white=(0, 0, 40, 60), kind="L"):
    image = Image.new("L", size, 0)
    image.paste(255, white)
    return image.convert(kind)


def weights_of(index, config, host, tmp_path):
    return cache_masks(index.masks, config, 8, Store(tmp_path / "store"), host)


@pytest.mark.parametrize(
    "values", [{"crop": False}, {"crop_style": "random", "crop_aspect": "square"}, {"crop_style": "corner"}]
)
def test_a_mask_lies_where_its_picture_does(pictures, masks, host, tmp_path, values):
    """A white square on black, its own mask, in four sizes; one of them turned by EXIF, one five times as long as wide."""
    for i, size in enumerate([(80, 60), (61, 150), (300, 299), (400, 80)]):
        image = half(size, (size[0] // 5, size[1] // 3, size[0] * 4 // 5, size[1] - 5), "RGB")
        exif = Image.Exif()
        if i == 1:
            exif[EXIF_ORIENTATION] = TURNED_LEFT
        ending = "jpg" if i == 1 else "png"
        (pictures.folder / f"{i}.png").unlink()
        image.save(pictures.folder / f"{i}.{ending}", quality=100, exif=exif)
        shutil.copy(pictures.folder / f"{i}.{ending}", masks / f"{i}.{ending}")
    config = with_masks(pictures.config(**values), masks)
    index = build_index(config, host, 3)
    weights = weights_of(index, config, host, tmp_path)
    assert len(index.samples) == len(present(index.masks).samples) == 4
    for sample in index.samples:
        seen = np.asarray(place_image(decode(index.read(sample)).convert("L"), sample), dtype=np.float32) / 255
        height, width = (edge // 8 for edge in seen.shape)
        expected = torch.from_numpy(seen.reshape(height, 8, width, 8).mean(axis=(1, 3)))[None]
        found = weights.get(sample)
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert found.min() >= 0 and found.max() <= 1
        torch.testing.assert_close(found, expected, atol=0.08, rtol=0)  # another filter at the edges
        assert (found - expected).abs().mean() < 0.01


def test_grey_is_in_between_and_black_counts_what_is_set(pictures, masks, host, tmp_path):
    for i, shade in enumerate([0, 51, 128, 255]):
        Image.new("L", (8, 6), shade).save(masks / f"{i}.png")  # a tenth of the picture's size
    config = with_masks(pictures.config(unmasked_weight=0.25), masks)
    index = build_index(config, host, 0)
    weights = weights_of(index, config, host, tmp_path)
    found = [weights.get(sample).unique().tolist() for sample in index.samples]
    assert found == [[0.25], [pytest.approx(0.4)], [pytest.approx(0.25 + 0.75 * 128 / 255)], [1.0]]


def test_sixteen_bits_two_colours_and_palettes_are_read(pictures, masks, host, tmp_path):
    left = half()
    left.convert("1").save(masks / "0.png")
    Image.fromarray(np.asarray(left).astype(np.uint16) * 257).save(masks / "1.png")
    left.convert("RGB").quantize(2).save(masks / "2.png")
    left.convert("RGB").save(masks / "3.webp", lossless=True)
    config = with_masks(pictures.config(), masks)
    index = build_index(config, host, 0)
    weights = weights_of(index, config, host, tmp_path)
    first, *others = (weights.get(sample) for sample in index.samples)
    assert first.min() == 0 and first.max() == 1 and all(torch.equal(first, other) for other in others)


def test_what_has_no_mask_is_left_out_with_the_reason_or_stops(pictures, masks, host, events):
    half().save(masks / "0.png")
    (masks / "1.png").write_bytes(b"no picture")
    half((60, 80)).save(masks / "2.png")
    config = with_masks(pictures.config(), masks)
    index = build_index(config, host, 0)
    assert [sample.name for sample in index.samples] == ["0.png"] and index.report["masks"] == 1
    assert [entry["reason"] for entry in index.report["skipped"]] == [
        "its mask 1.png: it is not an image file, despite its name",
        "its mask 2.png has 60 x 80 pixels, which is not the aspect ratio of its image, 80 x 60",
        "it has no mask with the same name in 'masks'",
    ]
    assert any(
        event.text == "1 of them have a mask that weights the loss" for event in events if isinstance(event, Notice)
    )
    with pytest.raises(
        UserError, match=r"3\.png: it has no mask with the same name in 'masks'; fix or remove it"
    ) as caught:
        build_index(with_masks(pictures.config(on_broken="stop"), masks), host, 0)
    assert len(caught.value.problems) == 3


def test_a_mask_that_was_replaced_after_the_scan_is_not_taken_for_the_one_before(pictures, masks, host, tmp_path):
    for i in range(4):
        Image.new("L", (80, 60), 50 * (i + 1)).save(masks / f"{i}.png")
    config = with_masks(pictures.config(), masks)
    index = build_index(config, host, 0)
    Image.new("L", (80, 60), 255).save(masks / "2.png")
    with pytest.raises(UserError, match=r"mask 2\.png was replaced or edited while the run was starting") as caught:
        weights_of(index, config, host, tmp_path)
    assert len(caught.value.problems) == 1


def test_a_mask_has_the_name_of_its_image_in_any_spelling_of_unicode(pictures, masks, host):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for number in range(4):
        half().save(masks / f"{number}.png")
    pictures(f"{composed}.png", (80, 60))
    half().save(masks / f"{decomposed}.png")
    index = build_index(with_masks(pictures.config(), masks), host, 0)
    assert len(index.samples) == 5 == len(present(index.masks).samples)


def test_masks_that_teach_nothing_are_told_all_at_once(pictures, masks, host, tmp_path):
    half().save(masks / "0.png")
    for i in (1, 2):
        Image.new("L", (80, 60), 0).save(masks / f"{i}.png")  # the same bytes
    clear = Image.new("RGBA", (80, 60), (255, 255, 255, 255))
    clear.paste((255, 255, 255, 0), (0, 0, 40, 60))
    clear.save(masks / "3.png")
    config = with_masks(pictures.config(), masks)
    faults = {}
    for _ in range(2):  # and again where the others are cached
        with pytest.raises(Unreadable) as caught:
            weights_of(build_index(config, host, 0), config, host, tmp_path)
        faults = caught.value.faults
        assert faults == {
            **{
                f"0/{i}.png": f"its mask {i}.png: it is entirely black, so nothing of the image would be trained on"
                for i in (1, 2)
            },
            "0/3.png": "its mask 3.png: it has transparent pixels, which are neither white nor black; save it without an alpha channel",
        }
    index = build_index(config, host, 0, faults)
    assert len(index.samples) == len(present(index.masks).samples) == 1
    weights_of(index, config, host, tmp_path)


def test_the_crop_sheet_darkens_what_is_black(pictures, masks, host, tmp_path):
    for i in range(4):
        Image.new("RGB", (80, 60), (255, 255, 255)).save(pictures.folder / f"{i}.png")
        half().save(masks / f"{i}.png")
    Image.new("LA", (80, 60), 0).save(masks / "1.png")  # transparent: told later
    draw_crop_sheet(build_index(with_masks(pictures.config(), masks), host, 0), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as page:
        middle = GAP + CELL // 2
        left, right = page.getpixel((middle - 30, middle)), page.getpixel((middle + 30, middle))
        whole = page.getpixel((middle + CELL + GAP + 30, middle))
    assert left == whole == (255, 255, 255) and max(right) < 150


def test_black_where_the_picture_is_kept(pictures, masks, host, tmp_path):
    for i in range(4):
        half((80, 60), (78, 0, 80, 60)).save(masks / f"{i}.png")
    config = with_masks(pictures.config(crop_aspect="square", crop_style="corner"), masks)
    with pytest.raises(Unreadable, match=r"0/0\.png") as caught:
        weights_of(build_index(config, host, 0), config, host, tmp_path)
    assert "entirely black in the part of the image that is used" in caught.value.faults["0/0.png"]


def test_folders_that_can_not_be_meant(pictures, masks, host):
    def told(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            build_index(with_masks(pictures.config(), folder), host, 0)
        return str(caught.value)

    assert (
        told(masks) == "masks: no images in 'masks' or its subfolders; put masks there, each with the name of its image"
    )
    half().save(masks / "0_mask.png")
    assert (
        "none of the 1 masks in 'masks' has the name of an image in 'pictures'; name the mask of 0.png, for example, 0.png"
        in told(masks)
    )
    half().save(masks / "0.png")
    half().save(masks / "0.webp")
    assert "'masks' has two masks named 0, one of them 0.webp; remove one" in told(masks)
    within = pictures.folder / "masks"
    within.mkdir()
    for folder in (within, pictures.folder):
        assert "is inside the image folder 'pictures', so masks would be trained on" in told(folder)


def test_parts_with_and_without(pictures, masks, host, tmp_path):
    for i in range(4):
        half().save(masks / f"{i}.png")
    plain = pictures.config()
    one = with_masks(plain, masks)
    both = DatasetConfig((*plain.parts, *one.parts), plain.roots * 2, ("", ""), ("", str(masks)))
    index = build_index(both, host, 0)
    weights = weights_of(index, both, host, tmp_path)
    found = {sample.key: weights.get(sample) for sample in index.samples}
    assert all(
        (weight == 1).all() and weight.shape == found["1/0.png"].shape
        for key, weight in found.items()
        if key.startswith("0/")
    )
    assert all(0 < weight.mean() < 1 for key, weight in found.items() if key.startswith("1/"))
    assert build_index(plain, host, 0).masks is None


def test_the_digest_changes_with_a_mask_and_with_nothing_else(pictures, masks, host):
    for i in range(4):
        half().save(masks / f"{i}.png")
    config = with_masks(pictures.config(), masks)
    before = build_index(config, host, 0).digest
    half().save(masks / "another.png")
    assert build_index(config, host, 0).digest == before != build_index(pictures.config(), host, 0).digest
    half(white=(0, 0, 30, 60)).save(masks / "2.png")
    assert build_index(config, host, 0).digest != before


def test_a_shape_at_another_scale():
    assert (
        is_same_shape((40, 30), (80, 60))
        and is_same_shape((341, 256), (1023, 767))
        and is_same_shape((342, 256), (1024, 768))
    )
    assert not is_same_shape((60, 80), (80, 60)) and not is_same_shape((344, 256), (1024, 768))
    assert [p.field for p in FolderConfig(unmasked_weight=0.5).problems()] == ["unmasked_weight"]
