"""Any picture a person may have -> RGB, 8 bits, upright, as it looks on a screen."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 178_000_000  # Pillow's own limit against decompression bombs; as RGB 0.5 GB
WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


T = TypeVar("T")


class BrokenImage(Exception):
    """The bytes are no picture that can be read. str() says why, for a person."""


def decode(raw: bytes, at_least: int = 0) -> Image.Image:
    """RGB, upright. Alpha is laid on white, 16 bits are scaled to 8, CMYK and palettes converted, of an animation the first frame is taken.

    Args:
        at_least: pixels that both edges need, 0 for all of them. A JPEG of more may come at a half, a quarter or an eighth,
            near to what a box filter gives: for a look at it, not for training.
    Raises:
        BrokenImage
    """
    return _read(raw, _flatten, at_least)


def decode_mask(raw: bytes) -> Image.Image:
    """Grey, 8 bits, upright, as decode.

    Raises:
        BrokenImage: as decode, or places of it are transparent.
    """
    grey = _read(raw, lambda image: _flatten(image).convert("L") if _is_opaque(image) else None)
    if grey is None:
        raise BrokenImage(
            "places of it are transparent, which says neither white nor black; save it without transparency"
        )
    return grey


def _read(raw: bytes, change: Callable[[Image.Image], T], at_least: int = 0) -> T:
    """change: of the upright first frame."""
    with _open(raw) as image:
        try:
            image.seek(0)
            if at_least:
                image.draft(None, (at_least, at_least))  # pyright: ignore[reportArgumentType]  None: the mode it has
            image.load()
            return change(ImageOps.exif_transpose(image))
        except Exception as error:  # each of Pillow's formats raises errors of its own, AVIF even RuntimeError
            raise BrokenImage(f"its data is broken or cut short ({error})") from error


def _is_opaque(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return True
    low, _ = image.convert("RGBA").getchannel("A").getextrema()
    return low == 255


def _open(raw: bytes) -> Image.Image:
    if not raw:
        raise BrokenImage("the file is empty")
    try:
        image = Image.open(io.BytesIO(raw))
    except UnidentifiedImageError as error:
        raise BrokenImage("it is no image, whatever its name says") from error
    except Image.DecompressionBombError as error:
        raise BrokenImage(f"it has more than {MAX_PIXELS // 1_000_000} megapixels") from error
    except Exception as error:  # see decode
        raise BrokenImage(f"its header is broken ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise BrokenImage(
            f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS // 1_000_000} megapixels"
        )
    if image.width == 0 or image.height == 0:
        raise BrokenImage("it has no pixels")
    return image


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode in WIDE_MODES:
        image = _eight_bits(image)
    if image.mode == "P" or "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBa"):
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits. Pillow's own convert clips at 255 instead of scaling."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        top = 1.0 if values.max(initial=0) <= 1 else 255.0
    else:
        top = 65535.0 if values.max(initial=0) > 255 or image.mode.startswith("I;16") else 255.0
    return Image.fromarray(np.clip(np.rint(values / top * 255), 0, 255).astype(np.uint8))
