"""Color profiles: converted to sRGB where they differ, and nothing else changes a bit."""

from __future__ import annotations

import io

import numpy as np
import pytest
from chroma_trainer.trainer_core.data.source.decode import decode, decode_mask, profile_of
from chroma_trainer.trainer_core.data.source.scan import scan_bytes
from PIL import Image, ImageCms

from tests.narrowing import of_type

# Colorants of Display P3, as numbers of an ICC profile (s15Fixed16, adapted to D50). Source: color.org, Display P3.
P3 = {"rXYZ": (0.51512, 0.2412, -0.00105), "gXYZ": (0.29198, 0.69225, 0.04189), "bXYZ": (0.1571, 0.06657, 0.78407)}


def profile(columns: dict[str, tuple[float, ...]] | None = None) -> bytes:
    """Return Pillow's sRGB profile, with other colorants where they are given."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for index in range(int.from_bytes(raw[128:132], "big")):
        entry = 132 + 12 * index
        name, offset = raw[entry : entry + 4].decode(), int.from_bytes(raw[entry + 4 : entry + 8], "big")
        for i, value in enumerate((columns or {}).get(name, ())):
            raw[offset + 8 + 4 * i : offset + 12 + 4 * i] = round(value * 65536).to_bytes(4, "big", signed=True)
    return bytes(raw)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def test_display_p3_is_converted_to_srgb():
    raw = encoded(Image.new("RGB", (8, 8), (200, 30, 30)), icc_profile=profile(P3))
    # The matrices and curves by hand: P3 (200, 30, 30) lies outside of sRGB in red, and green and blue become smaller.
    red, green, blue = of_type(decode(raw).getpixel((4, 4)), tuple)
    linear = [((v / 255 + 0.055) / 1.055) ** 2.4 if v / 255 > 0.04045 else v / 255 / 12.92 for v in (200, 30, 30)]
    srgb = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]])
    expected = np.linalg.inv(srgb) @ np.array([P3["rXYZ"], P3["gXYZ"], P3["bXYZ"]]).T @ linear
    gamma = [255 * (1.055 * v ** (1 / 2.4) - 0.055 if v > 0.0031308 else 12.92 * max(v, 0)) for v in expected]
    assert (red, green, blue) == pytest.approx([min(value, 255) for value in gamma], abs=2)
    assert red > 210 and profile_of(raw)


@pytest.mark.parametrize("options", [{}, {"icc_profile": profile()}, {"icc_profile": b"damaged"}, {"icc_profile": b""}])
def test_srgb_and_no_profile_keep_their_bytes(options):
    image = Image.effect_noise((32, 32), 90).convert("RGB")
    raw = encoded(image, **options)
    assert decode(raw).tobytes() == image.tobytes()
    assert profile_of(raw) == "" and scan_bytes(raw).pixels_sha256 == scan_bytes(raw).sha256


def test_a_converted_image_has_another_cache_key():
    scan = scan_bytes(encoded(Image.new("RGB", (8, 8)), icc_profile=profile(P3)))
    assert scan.profile and scan.pixels_sha256 != scan.sha256


def test_transparency_is_kept():
    raw = encoded(Image.new("RGBA", (4, 4), (200, 30, 30, 0)), icc_profile=profile(P3))
    assert decode(raw).getpixel((1, 1)) == (255, 255, 255)
    opaque = encoded(Image.new("RGBA", (4, 4), (200, 30, 30, 255)), icc_profile=profile(P3))
    assert decode(opaque).getpixel((1, 1)) == decode(
        encoded(Image.new("RGB", (4, 4), (200, 30, 30)), icc_profile=profile(P3))
    ).getpixel((1, 1))


@pytest.mark.parametrize("mode", ["P", "L", "LA", "I;16", "CMYK", "1"])
def test_a_profile_fits_its_mode_or_is_ignored(mode):
    """A gray or CMYK image with an RGB profile: other programs ignore the profile, and so do we. A palette is RGB."""
    image = Image.new("RGB", (8, 8), (200, 30, 30)).convert("P") if mode == "P" else Image.new(mode, (8, 8))
    format = "TIFF" if mode == "CMYK" else "PNG"
    with_profile, without = encoded(image, format, icc_profile=profile(P3)), encoded(image, format)
    assert (decode(with_profile).tobytes() == decode(without).tobytes()) == (mode != "P")


def test_gray_profiles_are_converted():
    lab = ImageCms.createProfile("LAB")  # no profile of gray images
    assert profile_of(encoded(Image.new("L", (8, 8), 90), icc_profile=ImageCms.ImageCmsProfile(lab).tobytes())) == ""
    raw = encoded(Image.new("L", (8, 8), 90), icc_profile=gray_profile(gamma=1.0))
    red, *_ = of_type(decode(raw).getpixel((0, 0)), tuple)
    assert red == pytest.approx(255 * (1.055 * (90 / 255) ** (1 / 2.4) - 0.055), abs=2)


def gray_profile(gamma: float) -> bytes:
    """Return a minimal ICC profile of gray images: white point and one curve."""
    curve = b"curv\0\0\0\0" + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big") + b"\0\0"
    white = b"XYZ \0\0\0\0" + b"".join(round(v * 65536).to_bytes(4, "big") for v in (0.9642, 1.0, 0.8249))
    text = b"desc\0\0\0\0" + (5).to_bytes(4, "big") + b"gray\0" + bytes(78)
    tags = {b"desc": text, b"wtpt": white, b"kTRC": curve}
    offset, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        table += name + (offset + len(data)).to_bytes(4, "big") + len(value).to_bytes(4, "big")
        data += value + bytes(-len(value) % 4)
    size = offset + len(data)
    header = size.to_bytes(4, "big") + b"lcms\x02\x10\0\0mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(88)
    header = header[:68] + white[8:20] + header[80:]
    return header + len(tags).to_bytes(4, "big") + table + data


def test_masks_are_numbers():
    raw = encoded(Image.new("RGB", (8, 8), (90, 90, 90)), icc_profile=profile({**P3, "rXYZ": (0.1, 0.1, 0.1)}))
    assert decode_mask(raw).getpixel((0, 0)) == 90
