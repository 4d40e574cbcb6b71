"""The learning score tells the demo's style from everything that a failed run draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from chroma_trainer.trainer_core.validation.style_metrics import fraction_in_style, style_score
from PIL import Image

DATASET = Path(__file__).parents[2] / "assets" / "neon-emoji"
THRESHOLD = json.loads((DATASET / "style.json").read_text(encoding="utf-8"))["threshold"]


def pictures() -> list[np.ndarray]:
    return [np.asarray(Image.open(file).convert("RGB")) for file in sorted(DATASET.glob("*.png"))]


def filled(*rgb: int) -> np.ndarray:
    return np.full((64, 64, 3), rgb, np.uint8)


def test_every_picture_of_the_dataset_is_in_style():
    assert 24 <= len(pictures()) <= 32
    assert fraction_in_style(pictures(), THRESHOLD) == 1.0


@pytest.mark.parametrize("rgb", [(255, 255, 255), (0, 0, 0), (128, 128, 128), (255, 40, 40), (30, 160, 255)])
def test_a_plain_area_is_not(rgb: tuple[int, int, int]):
    assert style_score(filled(*rgb)) == 0.0


def test_noise_is_not():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert style_score(noise) < THRESHOLD / 2


def test_a_drawing_on_white_is_not_even_with_black_and_bright_colours():
    picture = filled(255, 255, 255)
    picture[16:48, 16:48] = 0
    picture[24:40, 24:40] = (255, 30, 30)
    assert style_score(picture) < THRESHOLD


def test_a_bright_ring_on_near_black_is():
    y, x = np.mgrid[:64, :64] - 32
    picture = filled(8, 6, 20)
    picture[np.abs(np.hypot(x, y) - 20) < 1.5] = (0, 255, 230)
    assert style_score(picture) > THRESHOLD


def test_lines_count_by_their_share_and_then_in_full():
    picture = filled(0, 0, 0)
    picture[20:21, :48] = (255, 0, 0)  # of 4096 pixels, 123 count in full
    dark_rim = 1 - 4 / (64**2 - 56**2)
    assert style_score(picture) == pytest.approx(dark_rim * (48 / 4096) / 0.03)
    picture[20:28, :48] = (255, 0, 0)
    assert style_score(picture) == pytest.approx(1 - 32 / (64**2 - 56**2))


def test_a_style_does_not_depend_on_the_size():
    small = pictures()[0]  # 64 px
    large = small.repeat(3, axis=0).repeat(3, axis=1)
    assert style_score(large) == style_score(small)


def test_the_share_of_none_is_zero():
    assert fraction_in_style([], THRESHOLD) == 0.0
