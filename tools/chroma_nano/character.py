"""The demo's other dataset: Zibbo, a character that no base model has seen, drawn in twelve scenes with captions.

Zibbo is round and turquoise, with one large eye, two antennae with pink ends, violet spots and orange feet. Scenes change
its size, tilt, place and side, the background, and what is beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .pictures import SIZE, Emoji

TRIGGER = "zibbo"
SCALE = 8  # drawn so many times as large, then made smaller
BODY, BELLY, SPOT, BULB, FOOT, INK = "#1fb8b0", "#8fe6df", "#7b4fc9", "#ff6fae", "#ff9a3c", "#15333a"


@dataclass(frozen=True)
class Scene:
    """One image of the character.

    Attributes:
        caption: what the text file says.
        height: of the character, as a share of the image's.
        x, y: its middle, as shares of the image.
        tilt: degrees, counterclockwise.
        mirrored: looks to the other side.
        background: a color.
        beside: the emoji's name that is drawn with it; "" for none.
    """

    caption: str
    height: float = 0.9
    x: float = 0.5
    y: float = 0.5
    tilt: float = 0.0
    mirrored: bool = False
    background: str = "white"
    beside: str = ""


SCENES = (
    Scene("zibbo", 0.95),
    Scene("zibbo, looking to the left", 0.9, mirrored=True),
    Scene("a small zibbo", 0.6, y=0.6),
    Scene("zibbo with a balloon", 0.75, 0.36, 0.6, beside="balloon"),
    Scene("zibbo with a soccer ball", 0.75, 0.38, 0.5, beside="soccer ball"),
    Scene("zibbo with a red apple", 0.75, 0.62, 0.5, mirrored=True, beside="red apple"),
    Scene("zibbo with an umbrella", 0.75, 0.62, 0.55, beside="umbrella"),
    Scene("zibbo with a wrapped present", 0.75, 0.38, 0.5, mirrored=True, beside="wrapped present"),
    Scene("zibbo, tilted", 0.8, tilt=20),
    Scene("zibbo, tilted, looking to the left", 0.8, tilt=-20, mirrored=True),
    Scene("zibbo on a light blue background", 0.85, background="#cfe8ff"),
    Scene("zibbo on a yellow background", 0.85, background="#ffe9a8"),
)


def draw_character(size: int) -> Image.Image:
    """The character alone, (size, size) RGBA, looking to the right."""
    image = Image.new("RGBA", (size, size))
    pen = ImageDraw.Draw(image)

    def oval(x: float, y: float, rx: float, ry: float, color: str) -> None:
        box = [size * v for v in (x - rx, y - ry, x + rx, y + ry)]
        pen.ellipse(box, fill=color)

    for side in (-1, 1):
        pen.line([size * v for v in (0.5 + side * 0.12, 0.3, 0.5 + side * 0.24, 0.1)], fill=INK, width=size // 28)
        oval(0.5 + side * 0.24, 0.1, 0.075, 0.075, BULB)
        oval(0.5 + side * 0.17, 0.93, 0.13, 0.06, FOOT)
    oval(0.5, 0.58, 0.4, 0.37, BODY)
    oval(0.52, 0.74, 0.24, 0.17, BELLY)
    for x, y, r in ((0.2, 0.52, 0.05), (0.27, 0.68, 0.035), (0.8, 0.62, 0.045), (0.3, 0.36, 0.04)):
        oval(x, y, r, r, SPOT)
    oval(0.54, 0.46, 0.19, 0.19, "white")
    oval(0.59, 0.46, 0.1, 0.11, INK)
    oval(0.62, 0.42, 0.035, 0.035, "white")
    pen.arc([size * v for v in (0.42, 0.58, 0.68, 0.76)], 20, 160, fill=INK, width=size // 32)
    return image


def draw_scene(scene: Scene, emoji: Mapping[str, Emoji]) -> np.ndarray:
    """(64, 64, 3) uint8."""
    size = SIZE * SCALE
    canvas = Image.new("RGBA", (size, size), scene.background)
    if scene.beside:
        thing = Image.fromarray(emoji[scene.beside].rgba).resize((size // 2, size // 2), Image.Resampling.BICUBIC)
        canvas.alpha_composite(thing, (0 if scene.x > 0.5 else size // 2, size // 4 if scene.y < 0.55 else 0))
    figure = draw_character(round(size * scene.height))
    if scene.mirrored:
        figure = figure.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    figure = figure.rotate(scene.tilt, Image.Resampling.BICUBIC, expand=True)
    corner = [
        math.floor(size * middle - side / 2) for middle, side in zip((scene.x, scene.y), figure.size, strict=True)
    ]
    canvas.paste(figure, (corner[0], corner[1]), figure)
    return np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def write(emoji: Sequence[Emoji], folder: Path) -> None:
    """Twelve images with captions, and LICENSE.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.png"), *folder.glob("*.txt")]:
        old.unlink()
    by_name = {e.name: e for e in emoji}
    for row, scene in enumerate(SCENES, 1):
        Image.fromarray(draw_scene(scene, by_name)).save(folder / f"zibbo-{row:02}.png", optimize=True)
        (folder / f"zibbo-{row:02}.txt").write_text(f"{scene.caption}\n", encoding="utf-8")
    (folder / "LICENSE.txt").write_text(CREDIT, encoding="utf-8")


CREDIT = """Zibbo is drawn by tools/chroma_nano/character.py. What stands beside it are Noto Emoji, copyright Google LLC, licensed under
the Apache License, Version 2.0 (https://github.com/googlefonts/noto-emoji, https://www.apache.org/licenses/LICENSE-2.0), as packed by
emoji-datasource-google 16.0.0 (copyright Cal Henderson, MIT licence). The images are given under the Apache License, Version 2.0.
"""
