"""The crop sheet: each image whole, what is left out darkened."""

from __future__ import annotations

import pytest
from chroma_trainer.trainer_core.data.dataset import build_index
from chroma_trainer.trainer_core.plots.crop_sheet import CELL, GAP, MAX_IMAGES, draw_crop_sheet
from PIL import Image

from tests.narrowing import of_type


def white(folder, name, size):
    folder.mkdir(exist_ok=True)
    Image.new("RGB", size, (255, 255, 255)).save(folder / name)


def test_what_a_crop_leaves_out_is_darker(pictures, host, tmp_path):
    white(pictures.folder, "a.png", (192, 96))
    draw_crop_sheet(
        build_index(pictures.config(captions="filename", crop_aspect="square"), host, 0), tmp_path / "sheet.png"
    )
    page = Image.open(tmp_path / "sheet.png")
    assert page.size == (CELL + 2 * GAP, CELL + 2 * GAP)
    middle = GAP + CELL // 2
    assert page.getpixel((middle, middle)) == (255, 255, 255)
    assert all(max(of_type(page.getpixel((x, middle)), tuple)) < 150 for x in (GAP + 10, GAP + CELL - 10))


@pytest.mark.parametrize("size", [(5000, 5), (5, 5000), (1, 1), (3, 700)])
def test_shapes_out_of_the_ordinary(pictures, host, tmp_path, size):
    white(pictures.folder, "a.png", size)
    for crop_style in ("center", "corner", "random"):
        index = build_index(pictures.config(captions="filename", crop_style=crop_style), host, 0)
        draw_crop_sheet(index, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.size[0] == CELL + 2 * GAP


def test_of_a_large_dataset_an_even_share_is_shown(pictures, host, tmp_path):
    for i in range(MAX_IMAGES + 1):
        white(pictures.folder, f"{i:03}.png", (16, 16))
    draw_crop_sheet(build_index(pictures.config(captions="filename"), host, 0), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as page:
        width, height = page.size
    assert (width - GAP) // (CELL + GAP) == 8 and (height - GAP) // (CELL + GAP) == 5  # 33 of 65
