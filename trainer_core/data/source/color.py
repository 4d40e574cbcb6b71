"""Convert images with another color profile (ICC) to sRGB.

Images without a profile are sRGB by convention, and many profiles are sRGB under another name: neither is converted,
so their pixels stay exactly as they are in the file.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from PIL import Image, ImageChops

Transform = Callable[[Image.Image], Image.Image]

# Color space of a profile -> mode of the images that it describes.
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
SAME_LEVELS = 3  # of 255: profiles that differ from sRGB by at most this are sRGB. HP's and Google's differ by 1 or 2.
MAX_PROFILE_BYTES = 16 << 20


def srgb_transform(image: Image.Image) -> Transform | None:
    """Return the conversion of an opened image to sRGB; None if it is sRGB, or its profile is not usable."""
    profile = _profile(image)
    transform = _transform(profile) if profile else None
    if transform is None or transform[1] != _color_mode(image):
        return None
    return lambda loaded: _apply(loaded, transform[0], transform[1])


def profile_name(image: Image.Image) -> str:
    """Return the name of an opened image's profile, such as "Display P3"."""
    return _name(_profile(image))


def _profile(image: Image.Image) -> bytes:
    profile = image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) and len(profile) <= MAX_PROFILE_BYTES else b""


def _color_mode(image: Image.Image) -> str:
    """Return RGB, L or CMYK: the mode whose numbers the profile describes."""
    mode = image.mode
    if mode.startswith(("I", "F")) or mode in ("1", "L", "LA", "La"):
        return "L"
    return "CMYK" if mode == "CMYK" else "RGB"


def _apply(image: Image.Image, transform: Any, mode: str) -> Image.Image:
    """Return the image in sRGB: RGB, or RGBA if it has transparency."""
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    colors = image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA", "RGBa") else image.convert(mode)
    converted = transform.apply(colors)
    converted.info = {}
    if alpha:
        converted.putalpha(alpha)
    return converted


@lru_cache(maxsize=64)
def _transform(profile: bytes) -> tuple[Any, str] | None:
    """Return the transform to sRGB and its input mode; None if it changes nothing, or the profile is damaged."""
    from PIL import ImageCms

    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = MODES[source.profile.xcolor_space.strip()]
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        transform = ImageCms.ImageCmsTransform(
            source, target, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
        probe = _probe(mode)
        difference = ImageChops.difference(transform.apply(probe), probe.convert("RGB"))
    except (OSError, ValueError, TypeError, KeyError, ImageCms.PyCMSError):
        return None
    levels = max(high for _, high in difference.getextrema())  # pyright: ignore[reportGeneralTypeIssues]
    return None if levels <= SAME_LEVELS else (transform, mode)


def _probe(mode: str) -> Image.Image:
    """Return an image with colors from the whole cube."""
    if mode == "L":
        return Image.frombytes("L", (256, 1), bytes(range(256)))
    levels = range(0, 256, 17)
    values = bytes(level for r in levels for g in levels for b in levels for level in (r, g, b, 0)[: len(mode)])
    return Image.frombytes(mode, (16, 256), values)


@lru_cache(maxsize=64)
def _name(profile: bytes) -> str:
    from PIL import ImageCms

    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        name = ""
    return " ".join(name.split()) or "unnamed"
