"""Whatever a person has -> RGB as it looks on a screen, or a reason in words."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from chroma_trainer.trainer_core.data.source import decode as images
from chroma_trainer.trainer_core.data.source.decode import BrokenImage, decode
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def quarters(mode: str = "RGB") -> Image.Image:
    """40 x 20: red on the left, blue on the right."""
    image = Image.new("RGB", (40, 20), (250, 0, 0))
    image.paste((0, 0, 250), (20, 0, 40, 20))
    return image.convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed(orientation):
    upright = quarters()
    # What a camera stores for each value, so that a viewer shows `upright`.
    stored = {
        1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]  # fmt: skip
    image = upright
    for step in stored:
        image = image.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = decode(encoded(image, exif=exif))
    assert shown.size == (40, 20)
    assert np.array_equal(np.asarray(shown), np.asarray(upright))


def test_16_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 257 * 64, 257 * 128, 65535]], dtype=np.uint16)
    shown = np.asarray(decode(encoded(Image.fromarray(values))))
    assert shown[0, :, 0].tolist() == [0, 64, 128, 255]
    assert (shown[..., 0] == shown[..., 1]).all() and (shown[..., 0] == shown[..., 2]).all()


def test_a_dark_16_bit_picture_stays_dark():
    values = np.array([[0, 100, 200, 250]], dtype=np.uint16)
    assert np.asarray(decode(encoded(Image.fromarray(values))))[0, :, 0].tolist() == [0, 0, 1, 1]


def test_32_bit_float_grey():
    values = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert np.asarray(decode(encoded(Image.fromarray(values), "TIFF")))[0, :, 0].tolist() == [0, 128, 255]


def test_cmyk():
    shown = np.asarray(decode(encoded(quarters("CMYK"), "TIFF"))).astype(int)
    assert np.abs(shown - np.asarray(quarters()).astype(int)).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_every_mode_becomes_rgb(mode, kind):
    try:
        raw = encoded(quarters(mode), kind)
    except OSError:
        pytest.skip(f"{kind} has no {mode}")
    shown = decode(raw)
    assert shown.mode == "RGB" and shown.size == (40, 20)


def test_alpha_is_laid_on_white():
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (200, 0, 0, 128))
    assert [decode(encoded(image)).getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (255, 255, 255), (227, 127, 127)]


def test_grey_with_alpha_is_laid_on_white():
    image = Image.new("LA", (2, 1), (40, 255))
    image.putpixel((1, 0), (40, 0))
    assert [decode(encoded(image)).getpixel((x, 0)) for x in range(2)] == [(40, 40, 40), (255, 255, 255)]


def test_a_palette_with_a_transparent_colour_is_laid_on_white():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    shown = decode(encoded(image, transparency=1))
    assert [shown.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "WEBP" else {}
    raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert decode(raw).getpixel((4, 4)) == (250, 0, 0)


def test_an_empty_file_is_named_as_such():
    with pytest.raises(BrokenImage, match=r"^the file is empty$"):
        decode(b"")


def test_something_else_under_an_images_name():
    with pytest.raises(BrokenImage, match=r"^it is not an image file, despite its name$"):
        decode(b"<html>404 not found</html>")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_file_that_is_cut_short(kind):
    raw = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), kind)
    with pytest.raises(BrokenImage):
        decode(raw[: len(raw) // 2])


def test_a_look_at_a_large_jpeg_is_small_upright_and_whole():
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    large = quarters().resize((1600, 800))
    raw = encoded(large, "JPEG", exif=exif)
    shown = decode(raw, at_least=150)
    assert shown.size == (200, 400)
    assert (
        np.abs(
            np.asarray(shown, float) - np.asarray(decode(raw).resize((200, 400), Image.Resampling.BOX), float)
        ).mean()
        < 1
    )
    with pytest.raises(BrokenImage):
        decode(raw[: len(raw) // 2], at_least=150)
    assert decode(encoded(large), at_least=150).size == (1600, 800)


def test_more_pixels_than_allowed(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 500)
    with pytest.raises(BrokenImage, match=r"^it has 40 x 20 pixels, more than"):
        decode(encoded(quarters()))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "AVIF"])
def test_damaged_bytes_give_a_picture_or_a_reason_and_nothing_else(kind, recwarn):
    raw, draw = encoded(Image.effect_noise((24, 24), 90).convert("RGB"), kind), random.Random(kind)
    for _ in range(60):
        damaged = bytearray(raw)
        for _ in range(draw.randint(1, 6)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            assert decode(bytes(damaged)).mode == "RGB"
        except BrokenImage as error:
            assert str(error)
