"""Decode any image to RGB, 8 bits, upright, as it looks on an sRGB screen."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .color import Transform, profile_name, srgb_transform
from .formats import register_plugins

MAX_PIXELS = 178_000_000  # Pillow's own limit against decompression bombs; as RGB 0.5 GB
# A photo has 0.1 to 3 bytes per pixel. A file of 2.6 MB can unpack to 178 megapixels, which take 2.7 GB.
BOMB_PIXELS, BOMB_RATIO = 50_000_000, 50  # refused: at least so many pixels, and so many for each byte
WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


T = TypeVar("T")


class BrokenImage(Exception):
    """The bytes can't be decoded as an image. str() is the reason, for the user."""


def decode(raw: bytes, at_least: int = 0) -> Image.Image:
    """Return the image as RGB, upright.

    Transparent images are composited on white, 16 bits are scaled to 8, CMYK and palettes are converted, and of an
    animation the first frame is used. Other color profiles are converted to sRGB.

    Args:
        raw: Bytes of the file.
        at_least: Pixels needed along both edges; 0 for full size. A larger JPEG may be decoded at 1/2, 1/4 or 1/8 of
            its size, close to the result of a box filter. Use it for previews, not for training.
    Raises:
        BrokenImage: The bytes are no image, or are damaged.
    """
    return _read(raw, lambda image: _flatten(image, srgb_transform(image)), at_least)


def decode_mask(raw: bytes) -> Image.Image:
    """Return the image as 8-bit grayscale, upright. See `decode`. Its color profile is ignored: its values are numbers.

    Raises:
        BrokenImage: As for `decode`, or the image has transparent pixels.
    """
    grey = _read(raw, lambda image: _flatten(image).convert("L") if _is_opaque(image) else None)
    if grey is None:
        raise BrokenImage(
            "it has transparent pixels, which are neither white nor black; save it without an alpha channel"
        )
    return grey


def _read(raw: bytes, convert: Callable[[Image.Image], T], at_least: int = 0) -> T:
    """Return `convert` of the upright first frame."""
    with _open(raw) as image:
        try:
            image.seek(0)
            if at_least:
                image.draft(None, (at_least, at_least))  # pyright: ignore[reportArgumentType]  None: keep its mode
            image.load()
            return convert(ImageOps.exif_transpose(image))
        except Exception as error:  # every Pillow plugin raises its own errors, AVIF even RuntimeError
            raise BrokenImage(f"its data is damaged or truncated ({error})") from error


def profile_of(raw: bytes) -> str:
    """Return the name of the color profile from which `decode` converts to sRGB; "" if it does not."""
    try:
        with _open(raw) as image:
            return profile_name(image) if srgb_transform(image) else ""
    except BrokenImage:
        return ""


def _is_opaque(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return True
    low, _ = image.convert("RGBA").getchannel("A").getextrema()
    return low == 255


def _open(raw: bytes) -> Image.Image:
    if not raw:
        raise BrokenImage("the file is empty")
    register_plugins()
    try:
        image = Image.open(io.BytesIO(raw))
    except UnidentifiedImageError as error:
        raise BrokenImage("it is not an image file, despite its name") from error
    except Image.DecompressionBombError as error:
        raise BrokenImage(f"it has more than {MAX_PIXELS // 1_000_000} megapixels") from error
    except Exception as error:  # see decode
        raise BrokenImage(f"its header is damaged ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise BrokenImage(
            f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS // 1_000_000} megapixels"
        )
    if is_bomb(image, raw):
        raise BrokenImage(
            f"it has {image.width} x {image.height} pixels in only {len(raw) / 1e6:.1f} MB, as a decompression bomb; "
            "scale it down"
        )
    if image.width == 0 or image.height == 0:
        raise BrokenImage("it has no pixels")
    return image


def is_bomb(image: Image.Image, raw: bytes) -> bool:
    """Return whether an image that was opened, but not decoded, has far more pixels than its bytes can describe."""
    return image.width * image.height > max(BOMB_PIXELS, BOMB_RATIO * len(raw))


def _flatten(image: Image.Image, to_srgb: Transform | None = None) -> Image.Image:
    if image.mode in WIDE_MODES:
        image = _to_eight_bits(image)
    if to_srgb:
        image = to_srgb(image)
    if image.mode == "P" or "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBa"):
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert grayscale of 16 or 32 bits to 8. Pillow's own `convert` clips at 255 instead of scaling."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        top = 1.0 if values.max(initial=0) <= 1 else 255.0
    else:
        top = 65535.0 if values.max(initial=0) > 255 or image.mode.startswith("I;16") else 255.0
    return Image.fromarray(np.clip(np.rint(values / top * 255), 0, 255).astype(np.uint8))
