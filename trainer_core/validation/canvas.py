"""What every picture we draw shares: colours, fonts, wrapped text, smooth shapes. Pillow only."""

from __future__ import annotations

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
ELLIPSIS = "…"
LAST_LATIN = 0x24F  # Pillow's own font covers Latin and common punctuation
WIDER_FONTS = (  # tried in turn for other scripts; each system has one of them
    "NotoSansCJK-Regular.ttc",
    "YuGothM.ttc",
    "msyh.ttc",
    "Hiragino Sans GB.ttc",
    "PingFang.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
)


@lru_cache(maxsize=64)
def font(size: float, wide: bool = False) -> Font:
    """Pillow's own font, or for scripts it lacks (wide) the first of the system's that is there. size in pixels."""
    for name in WIDER_FONTS if wide else ():
        try:
            return ImageFont.truetype(name, round(size))
        except OSError:
            continue
    return ImageFont.load_default(size)


def font_for(text: str, size: float) -> Font:
    """The font that can show this text."""
    return font(size, any(ord(c) > LAST_LATIN and not 0x2000 <= ord(c) <= 0x22FF for c in text))


def write(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: float, colour: Colour = INK, anchor: str = "la"
) -> None:
    """One line of text. anchor: Pillow's two letters, such as "la" (left, ascender) or "mm" (middle, middle)."""
    draw.text(at, text, fill=colour, font=font_for(text, size), anchor=anchor)


def text_width(text: str, size: float) -> float:
    """Pixels that one line takes."""
    return font_for(text, size).getlength(text)


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

    paint(draw, k) gets a canvas k times as large, with its origin at the box's corner; its RGBA colours are blended over.
    """
    left, top, right, bottom = box
    size = (right - left, bottom - top)
    large = Image.new("RGB", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING))
    large.paste(image.crop(box).resize(large.size, Image.Resampling.NEAREST))
    paint(ImageDraw.Draw(large, "RGBA"), OVERSAMPLING)
    image.paste(large.resize(size, Image.Resampling.BOX), (left, top))


def rounded_mask(size: tuple[int, int], radius: int) -> Image.Image:
    """Grey mask of a rectangle with smooth round corners."""
    large = Image.new("L", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), 0)
    box = (0, 0, large.size[0] - 1, large.size[1] - 1)
    ImageDraw.Draw(large).rounded_rectangle(box, radius * OVERSAMPLING, fill=255)
    return large.resize(size, Image.Resampling.BOX)
