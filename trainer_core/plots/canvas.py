"""What every picture we draw shares: colours, fonts, wrapped text, smooth shapes. Pillow only."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
PANEL: Colour = (246, 247, 250)
INK: Colour = (24, 28, 38)
SOFT_INK: Colour = (96, 104, 120)
RULE: Colour = (226, 229, 236)
BLUE: Colour = (58, 96, 222)
AMBER: Colour = (232, 146, 40)
TEAL: Colour = (18, 150, 130)
ROSE: Colour = (212, 70, 110)

OVERSAMPLING = 3  # shapes are drawn this much larger and scaled down: Pillow's own edges are jagged
LARGEST_TEXT = 28
ELLIPSIS = "…"
NO_GLYPH = "\uffff"  # never a character, so every font shows its sign for a missing one
WIDER_FONTS = (  # tried in turn for what Pillow's own font lacks; most systems have one of them
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
    """The first of the system's fonts for many scripts, or None. size in pixels."""
    for name in WIDER_FONTS:
        try:
            return ImageFont.truetype(name, round(size))
        except OSError:
            continue
    return None


@lru_cache(maxsize=64)
def own_font(size: float) -> Font:
    """Pillow's own font: there on every system, but for little more than English."""
    return ImageFont.load_default(size)


@lru_cache(maxsize=4096)
def has_glyph(character: str) -> bool:
    """Whether Pillow's own font can show it."""
    if character < "\x7f":
        return True
    return _draw_glyph(character) != _draw_glyph(NO_GLYPH)


def _draw_glyph(character: str) -> bytes:
    image = Image.new("L", (40, 40))
    ImageDraw.Draw(image).text((4, 4), character, fill=255, font=own_font(24))
    return image.tobytes()


def font_for(text: str, size: float) -> Font:
    """The font that can show this text, as far as there is one."""
    return own_font(size) if all(map(has_glyph, text)) else wide_font(size) or own_font(size)


def readable(text: str) -> str:
    """The text, without its accents where no font of this system could show them."""
    if all(map(has_glyph, text)) or wide_font(LARGEST_TEXT) is not None:
        return text
    plain = (unicodedata.normalize("NFKD", c) for c in text)
    return "".join(c if has_glyph(c) else p[0] for c, p in zip(text, plain, strict=True))


def write(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: float, colour: Colour = INK, anchor: str = "la"
) -> None:
    """One line of text. anchor: Pillow's two letters, such as "la" (left, ascender) or "mm" (middle, middle)."""
    text = readable(text)
    draw.text(at, text, fill=colour, font=font_for(text, size), anchor=anchor)


def text_width(text: str, size: float) -> float:
    """Pixels that one line takes."""
    return font_for(text, size).getlength(readable(text))


def wrap(text: str, size: float, width: float, max_lines: int) -> list[str]:
    """Lines of at most `width` pixels. Breaks at spaces, within a word only where it alone is too long; ends with an
    ellipsis where max_lines are not enough."""
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
    """One line of at most `width` pixels, with an ellipsis where something had to go."""
    if text_width(text, size) <= width:
        return text
    kept = text.removesuffix(ELLIPSIS)
    while kept and text_width(f"{kept.rstrip()}{ELLIPSIS}", size) > width:
        kept = kept[:-1]
    return f"{kept.rstrip()}{ELLIPSIS}"


def shapes(
    image: Image.Image, box: tuple[int, int, int, int], paint: Callable[[ImageDraw.ImageDraw, int], None]
) -> None:
    """Draw with smooth edges over `box` (left, top, right, bottom) of an RGB image.

    paint(draw, k) gets a canvas k times as large, its origin at the box's corner; RGBA colours are blended over.
    """
    left, top, right, bottom = box
    size = (right - left, bottom - top)
    large = Image.new("RGB", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING))
    large.paste(image.crop(box).resize(large.size, Image.Resampling.NEAREST))
    paint(ImageDraw.Draw(large, "RGBA"), OVERSAMPLING)
    image.paste(large.resize(size, Image.Resampling.BOX), (left, top))


def round_corners(size: tuple[int, int], radius: int) -> Image.Image:
    """Grey mask of a rectangle with smooth round corners."""
    large = Image.new("L", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), 0)
    box = (0, 0, large.size[0] - 1, large.size[1] - 1)
    ImageDraw.Draw(large).rounded_rectangle(box, radius * OVERSAMPLING, fill=255)
    return large.resize(size, Image.Resampling.BOX)
