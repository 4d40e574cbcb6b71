"""A size is told without decoding only where decoding would tell the same."""

from __future__ import annotations

import io

import pytest
from chroma_trainer.trainer_core.data.source.decode import BrokenImage, decode
from chroma_trainer.trainer_core.data.source.integrity import upright_size
from PIL import Image


def encoded(kind: str, mode: str = "RGB", orientation: int = 0, **settings) -> bytes:
    image = Image.effect_noise((50, 30), 60).convert(mode)
    if orientation:
        exif = Image.Exif()
        exif[0x0112] = orientation
        settings["exif"] = exif
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_whole_files(kind, mode):
    assert upright_size(encoded(kind, mode)) == (50, 30)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_as_decoding_has_it(kind, orientation):
    raw = encoded(kind, orientation=orientation)
    assert upright_size(raw) in (decode(raw).size, None)
    assert upright_size(encoded("JPEG", orientation=6)) == (30, 50)  # without decoding, for photographs are many


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_file_that_is_cut_short_is_not_whole(kind):
    raw = encoded(kind)
    for length in {1, 20, len(raw) // 2, len(raw) - 20, len(raw) - 3}:
        assert upright_size(raw[:length]) is None


def test_a_changed_byte_of_a_png():
    raw = bytearray(encoded("PNG"))
    raw[len(raw) // 2] ^= 1
    assert upright_size(bytes(raw)) is None
    with pytest.raises(BrokenImage):
        decode(bytes(raw))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF"])
def test_other_kinds_are_decoded(kind):
    assert upright_size(encoded(kind)) is None and decode(encoded(kind)).size == (50, 30)


@pytest.mark.parametrize("raw", [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xff\xd9", b"RIFF\0\0\0\0WEBP", b"<html>"])
def test_rubbish(raw):
    assert upright_size(raw) is None
