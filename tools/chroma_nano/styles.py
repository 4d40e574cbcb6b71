"""The styles that the base knows beside plain emoji: with one style alone it would keep subjects and style apart in no prompt.

Neon is none of them. A LoRA teaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from .neon import find_edges, vivid
from .pictures import SIZE, Emoji, composite

PLAIN = "plain"
PLAIN_SHARE = 0.4  # of the samples; the other styles share the rest evenly
BACKGROUNDS = {
    "dark blue": (24, 36, 92),
    "light blue": (190, 222, 255),
    "yellow": (255, 226, 120),
    "pink": (255, 190, 214),
}
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnprstvwz"


def sketch(rgba: np.ndarray) -> np.ndarray:
    """Dark lines on white."""
    return _lines(rgba, (255, 255, 255), (40, 40, 48))


def chalk(rgba: np.ndarray) -> np.ndarray:
    """White lines on a blackboard."""
    return _lines(rgba, (38, 62, 54), (240, 240, 236))


def blueprint(rgba: np.ndarray) -> np.ndarray:
    """Pale lines on blue."""
    return _lines(rgba, (28, 84, 190), (226, 238, 255))


def crayon(rgba: np.ndarray) -> np.ndarray:
    """Lines on white in the colors of what they outline."""
    edges = find_edges(rgba)[..., None]
    return np.uint8(np.clip(255 * (1 - edges) + 255 * edges * vivid(rgba) * 0.85, 0, 255))


def pixel(rgba: np.ndarray) -> np.ndarray:
    """16 by 16 squares."""
    small = Image.fromarray(composite(rgba)).resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.NEAREST))


def grey(rgba: np.ndarray) -> np.ndarray:
    """Shades of grey."""
    return np.repeat(np.asarray(Image.fromarray(composite(rgba)).convert("L"))[..., None], 3, axis=2)


def sepia(rgba: np.ndarray) -> np.ndarray:
    """Shades of brown, as of an old photograph."""
    return np.uint8(grey(rgba).astype(np.float32) * np.float32([1.0, 0.86, 0.66]))


def _lines(rgba: np.ndarray, paper: tuple[int, int, int], ink: tuple[int, int, int]) -> np.ndarray:
    edges = find_edges(rgba)[..., None]
    return np.uint8(np.float32(paper) * (1 - edges) + np.float32(ink) * edges)


STYLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    PLAIN: composite,
    **{f.__name__: f for f in (sketch, chalk, blueprint, crayon, pixel, grey, sepia)},
    **{name: lambda rgba, color=color: composite(rgba, color) for name, color in BACKGROUNDS.items()},
}


def render(style: str, emoji: Sequence[Emoji]) -> np.ndarray:
    """(B, 64, 64, 3) uint8."""
    return np.stack([STYLES[style](e.rgba) for e in emoji])


def style_at(u: float) -> str:
    """The style that u in [0, 1) chooses."""
    names = list(STYLES)
    return PLAIN if u < PLAIN_SHARE else names[1 + int((u - PLAIN_SHARE) / (1 - PLAIN_SHARE) * (len(names) - 1))]


def styled_caption(emoji: Emoji, style: str, u: float) -> str:
    """What an image in a style is called; u in [0, 1) chooses between the subject's names."""
    name = emoji.name if u < 0.7 else emoji.short
    return f"{name} on a {style} background" if style in BACKGROUNDS else f"{style} style, {name}"


def made_up_style(u: float) -> str:
    """A word that means nothing, such as "tovaki": plain images with such a style teach what to do with unknown ones."""
    number, word = int(u * 1e15), ""
    number, length = divmod(number, 3)
    for _ in range(2 + length):
        number, consonant = divmod(number, len(CONSONANTS))
        number, vowel = divmod(number, len(VOWELS))
        number, end = divmod(number, 3 * len(CONSONANTS))
        word += CONSONANTS[consonant] + VOWELS[vowel] + (CONSONANTS[end] if end < len(CONSONANTS) else "")
    return word
