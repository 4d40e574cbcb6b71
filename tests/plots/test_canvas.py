import pytest
from chroma_trainer.trainer_core.plots import canvas
from chroma_trainer.trainer_core.plots.canvas import (
    ELLIPSIS,
    has_glyph,
    readable,
    round_corners,
    shapes,
    shorten,
    text_width,
    wrap,
)
from PIL import Image, ImageDraw

from tests.narrowing import of_type, present

PROMPT = "a neon fox on a dark road, thin glowing outlines, rain, reflections in the puddles"


@pytest.mark.parametrize("width", [120, 150, 400, 2000])
def test_wrapped_lines_fit_and_lose_nothing(width):
    lines = wrap(PROMPT, 17, width, 99)
    assert all(text_width(line, 17) <= width for line in lines)
    assert " ".join(lines) == PROMPT


def test_a_word_that_is_too_long_is_cut():
    lines = wrap("x" * 100, 17, 120, 99)
    assert "".join(lines) == "x" * 100 and all(text_width(line, 17) <= 120 for line in lines)


@pytest.mark.parametrize("max_lines", [1, 2, 3])
def test_what_does_not_fit_ends_with_an_ellipsis(max_lines):
    lines = wrap(PROMPT, 17, 150, max_lines)
    assert len(lines) == max_lines and lines[-1].endswith(ELLIPSIS)
    assert all(text_width(line, 17) <= 150 for line in lines)


def test_empty_and_very_narrow_texts():
    assert wrap("", 17, 100, 3) == [""]
    assert wrap("ab", 17, 1, 9) == ["a", "b"]
    assert shorten("short", 17, 500) == "short"


def test_glyphs_that_the_own_font_lacks_are_known():
    assert has_glyph("a") and has_glyph("…") and has_glyph("·")
    assert not has_glyph("猫")


def test_accents_go_only_where_no_font_has_them(monkeypatch):
    monkeypatch.setattr(canvas, "wide_font", lambda size: None)
    assert readable("café, naïve, 猫") == "cafe, naive, 猫"
    monkeypatch.setattr(canvas, "wide_font", canvas.own_font)
    assert readable("café") == "café"


def test_edges_are_smooth():
    image = Image.new("RGB", (40, 40), canvas.PAPER)
    disc = (*canvas.BLUE, 255)
    shapes(image, (0, 0, 40, 40), lambda brush, k: brush.ellipse((5 * k, 5 * k, 30 * k, 30 * k), fill=disc))
    assert image.getpixel((17, 17)) == canvas.BLUE and image.getpixel((38, 38)) == canvas.PAPER
    assert len(present(image.getcolors(2000))) > 4


def test_shapes_touch_nothing_outside_of_their_box():
    image = Image.new("RGB", (40, 40), canvas.PAPER)
    shapes(image, (10, 10, 20, 20), lambda brush, k: brush.rectangle((-99, -99, 999, 999), fill=(0, 0, 0, 255)))
    assert image.getpixel((9, 9)) == image.getpixel((20, 20)) == canvas.PAPER and image.getpixel((10, 19)) == (0, 0, 0)


def test_rounded_corners():
    mask = round_corners((30, 20), 6)
    assert mask.size == (30, 20) and of_type(mask.getpixel((0, 0)), int) < 40 and mask.getpixel((15, 10)) == 255


def test_drawing_a_line_of_text_leaves_ink():
    image = Image.new("RGB", (100, 30), canvas.PAPER)
    canvas.write(ImageDraw.Draw(image), (2, 2), "chroma", 17)
    assert min(image.convert("L").tobytes()) < 100
