"""Shared drawing tools of all charts and sheets: colors, fonts, wrapped text, smooth shapes. Needs only Pillow."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Color = tuple[int, int, int]

PAPER: Color = (255, 255, 255)
PANEL: Color = (246, 247, 250)
INK: Color = (24, 28, 38)
SOFT_INK: Color = (96, 104, 120)
RULE: Color = (226, 229, 236)
BLUE: Color = (58, 96, 222)
AMBER: Color = (232, 146, 40)
TEAL: Color = (18, 150, 130)
ROSE: Color = (212, 70, 110)

OVERSAMPLING = 3  # shapes are drawn this many times larger and scaled down, because Pillow does not antialias
LARGEST_TEXT = 28
ELLIPSIS = "…"
NO_GLYPH = "\uffff"  # never a character, so that every font renders its missing-glyph symbol
WIDER_FONTS = (  # tried in order for characters that Pillow's built-in font lacks; most systems have one of them
    "NotoSansCJK-Regular.ttc",
    "YuGothM.ttc",
    "msyh.ttc",
    "Hiragino Sans GB.ttc",
    "PingFang.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
    "LiberationSans-Regular.ttf",
)


@lru_cache(maxsize=64)
def wide_font(size: float) -> Font | None:
    """Return the first available system font with many scripts, or None.

    Args:
        size: In pixels.
    """
    for name in WIDER_FONTS:
        try:
            return ImageFont.truetype(name, round(size))
        except OSError:
            continue
    return None


@lru_cache(maxsize=64)
def own_font(size: float) -> Font:
    """Return Pillow's built-in font, which is available on every system but supports little more than English."""
    return ImageFont.load_default(size)


@lru_cache(maxsize=4096)
def has_glyph(character: str) -> bool:
    """Return whether Pillow's built-in font can render the character."""
    if character < "\x7f":
        return True
    return _draw_glyph(character) != _draw_glyph(NO_GLYPH)


def _draw_glyph(character: str) -> bytes:
    image = Image.new("L", (40, 40))
    ImageDraw.Draw(image).text((4, 4), character, fill=255, font=own_font(24))
    return image.tobytes()


def font_for(text: str, size: float) -> Font:
    """Return a font that can render this text, if there is one."""
    return own_font(size) if all(map(has_glyph, text)) else wide_font(size) or own_font(size)


def readable(text: str) -> str:
    """Return the text, with accents removed if no font of this system can render them."""
    if all(map(has_glyph, text)) or wide_font(LARGEST_TEXT) is not None:
        return text
    plain = (unicodedata.normalize("NFKD", c) for c in text)
    return "".join(c if has_glyph(c) else p[0] for c, p in zip(text, plain, strict=True))


def write(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: float, color: Color = INK, anchor: str = "la"
) -> None:
    """Draw one line of text.

    Args:
        draw: The target.
        at: Position of the anchor.
        text: The text.
        size: In pixels.
        color: RGB.
        anchor: Pillow's text anchor, such as "la" (left, ascender) or "mm" (middle, middle).
    """
    text = readable(text)
    draw.text(at, text, fill=color, font=font_for(text, size), anchor=anchor)


def text_width(text: str, size: float) -> float:
    """Return the width of one line in pixels."""
    return font_for(text, size).getlength(readable(text))


def wrap(text: str, size: float, width: float, max_lines: int) -> list[str]:
    """Return lines of at most `width` pixels.

    Lines break at spaces, and within a word only if it is too long for a line. If max_lines are not enough, the last
    one ends with an ellipsis.
    """
    lines, line = [], ""
    for word in " ".join(text.split()).split(" "):
        candidate = f"{line} {word}".strip()
        if text_width(candidate, size) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        while text_width(word, size) > width and len(word) > 1:
            cut = max(1, next(i for i in range(1, len(word) + 1) if text_width(word[:i], size) > width) - 1)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    lines.append(line)
    if len(lines) <= max_lines:
        return lines
    return [*lines[: max_lines - 1], shorten(f"{lines[max_lines - 1]}{ELLIPSIS}", size, width)]


def shorten(text: str, size: float, width: float) -> str:
    """Return one line of at most `width` pixels, with an ellipsis if the text was truncated."""
    if text_width(text, size) <= width:
        return text
    prefix = text.removesuffix(ELLIPSIS)
    while prefix and text_width(f"{prefix.rstrip()}{ELLIPSIS}", size) > width:
        prefix = prefix[:-1]
    return f"{prefix.rstrip()}{ELLIPSIS}"


def shapes(
    image: Image.Image, box: tuple[int, int, int, int], paint: Callable[[ImageDraw.ImageDraw, int], None]
) -> None:
    """Draw with antialiasing in `box` (left, top, right, bottom) of an RGB image.

    paint(draw, k) gets a canvas that is k times as large, with its origin at the corner of the box. RGBA colors are
    blended.
    """
    left, top, right, bottom = box
    size = (right - left, bottom - top)
    enlarged = (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING)
    large = image.crop(box).resize(enlarged, Image.Resampling.NEAREST)
    paint(ImageDraw.Draw(large, "RGBA"), OVERSAMPLING)
    image.paste(large.reduce(OVERSAMPLING), (left, top))


def round_corners(size: tuple[int, int], radius: int) -> Image.Image:
    """Return a grayscale mask of a rectangle with antialiased round corners."""
    large = Image.new("L", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), 0)
    box = (0, 0, large.size[0] - 1, large.size[1] - 1)
    ImageDraw.Draw(large).rounded_rectangle(box, radius * OVERSAMPLING, fill=255)
    return large.reduce(OVERSAMPLING)
