"""The emoji: where they come from, which are held back, and what they are called."""

from __future__ import annotations

import colorsys
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGE = "emoji-datasource-google@16.0.0"  # artwork: Noto Emoji by Google, Apache-2.0; names: Cal Henderson, MIT
SIZE = 64
NUM_HELD_OUT = 120
NUM_NEON_SOURCES = 28
SOURCE_CATEGORIES = (
    "Animals & Nature",
    "Food & Drink",
    "Smileys & Emotion",
    "Travel & Places",
    "Objects",
    "Activities",
)
COLOUR_SHARE = 0.18  # of the drawn pixels: from here on a colour is named


@dataclass(frozen=True, eq=False)
class Emoji:
    """One picture and its words.

    Args:
        code: code points, such as "1f431".
        name: lower-case name, such as "cat face".
        short: the colloquial name, such as "cat".
        group, kind: category and subcategory, such as "animals & nature" and "animal mammal".
        colours: at most two words, the most common first.
        rgba: (64, 64, 4), uint8.
    """

    code: str
    name: str
    short: str
    group: str
    kind: str
    colours: tuple[str, ...]
    rgba: np.ndarray


def fetch_package(folder: Path) -> Path:
    """The unpacked npm package, downloaded by npm if it is not in the folder yet."""
    package = folder / "package"
    if (package / "emoji.json").is_file():
        return package
    folder.mkdir(parents=True, exist_ok=True)
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(f"npm is needed to fetch {PACKAGE}; or unpack its archive yourself as {package}")
    subprocess.run([npm, "pack", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(folder.glob("emoji-datasource-google-*.tgz"))) as archive:
        wanted = [m for m in archive if "/img/google/64/" in m.name or m.name.count("/") == 1]
        archive.extractall(folder, wanted, filter="data")
    return package


def load_emoji(package: Path) -> list[Emoji]:
    """Every emoji that has a picture, in the order of code points. Skin tones are left out: one drawing, six paints."""
    found = []
    for entry in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        file = package / "img" / "google" / "64" / entry["image"]
        if not entry["has_img_google"] or entry["category"] == "Component" or not file.is_file():
            continue
        rgba = np.asarray(Image.open(file).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        short, colours = _words(entry["short_name"]), name_colours(rgba)
        found.append(
            Emoji(
                code=entry["unified"].lower(),
                name=_honest(_words(entry["name"] or short), colours),
                short=short,
                group=_words(entry["category"]),
                kind=_words(entry["subcategory"]),
                colours=colours,
                rgba=rgba,
            )
        )
    return sorted(found, key=lambda emoji: emoji.code)


def split(emoji: list[Emoji]) -> tuple[list[Emoji], list[Emoji], list[Emoji]]:
    """(training, held-out emoji that only the VAE is measured on, other held-out ones), decided by a hash of the code points.

    The first of the held-out ones are spread evenly over the categories that hold things rather than signs, and fill no
    picture to its rim: they were the subjects of the neon pictures until the base was trained on 200 subjects.
    """
    eligible = [e for e in emoji if e.group in {_words(c) for c in SOURCE_CATEGORIES}]
    ranked = sorted(eligible, key=lambda e: hashlib.sha256(e.code.encode()).digest())[:NUM_HELD_OUT]
    by_group = {group: [e for e in ranked if e.group == group] for group in sorted({e.group for e in ranked})}
    turns = [e for row in range(NUM_HELD_OUT) for group in by_group.values() for e in group[row : row + 1]]
    sources = [e for e in turns if stands_free(e.rgba)][:NUM_NEON_SOURCES]
    others = [e for e in turns if e not in sources]
    held_out = {e.code for e in ranked}
    return [e for e in emoji if e.code not in held_out], sources, others


def stands_free(rgba: np.ndarray) -> bool:
    """Whether at least three quarters of the rim, four pixels wide, is empty."""
    is_rim = np.ones(rgba.shape[:2], bool)
    is_rim[4:-4, 4:-4] = False
    return float((rgba[is_rim][:, 3] < 128).mean()) >= 0.75


def is_taught(emoji: Emoji) -> bool:
    """Whether the transformer is trained on it. Flags, families and the his-and-hers variants of people are left out: many
    near-copies of few drawings, which would take time from the things that a prompt is likely to name."""
    is_variant = "-200d-2640" in emoji.code or "-200d-2642" in emoji.code
    return not (emoji.group == "flags" or emoji.kind == "family" or is_variant)


def is_thing(emoji: Emoji) -> bool:
    """Whether it is a thing or a face rather than a sign, a clock, a hand or a person: what the last part of the training is for."""
    signs = (
        "alphanum",
        "geometric",
        "av symbol",
        "other symbol",
        "keycap",
        "arrow",
        "transport sign",
        "warning",
        "religion",
    )
    return not (
        emoji.kind in (*signs, "zodiac", "punctuation", "math", "gender", "currency", "time")
        or emoji.kind.startswith(("person", "hand"))
    )


def composite(rgba: np.ndarray, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """(H, W, 4) uint8 on a plain colour -> (H, W, 3) uint8."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.rint(rgba[..., :3] * alpha + np.float32(background) * (1 - alpha)).astype(np.uint8)


def name_colours(rgba: np.ndarray) -> tuple[str, ...]:
    """The one or two most common colours of the drawn pixels, as words."""
    drawn = rgba[rgba[..., 3] > 128][::4, :3]
    words = [_colour(*pixel) for pixel in drawn / 255.0]
    counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
    return tuple(word for count, word in counts[:2] if count >= COLOUR_SHARE * len(words))


def _colour(r: float, g: float, b: float) -> str:
    hue, saturation, value = colorsys.rgb_to_hsv(r, g, b)
    if value < 0.22:
        return "black"
    if saturation < 0.15:
        return "white" if value > 0.85 else "grey"
    degrees = hue * 360
    if 15 <= degrees < 48 and value < 0.7:
        return "brown"
    for limit, word in (
        (15, "red"),
        (36, "orange"),
        (70, "yellow"),
        (165, "green"),
        (255, "blue"),
        (290, "purple"),
        (340, "pink"),
    ):
        if degrees < limit:
            return word
    return "red"


def _words(text: str) -> str:
    """Lower case, single spaces, no underscores or hyphens: what a person would type."""
    return re.sub(r"\s+", " ", re.sub(r"[_\-]+", " ", text.lower())).strip()


def _honest(name: str, colours: tuple[str, ...]) -> str:
    """Without Unicode's "black" and "white", which mean filled and outlined, where the picture is of another colour."""
    kept = [w for w in name.split() if w != "heavy" and (w not in ("black", "white") or w in colours)]
    return " ".join(kept) or name


def caption(emoji: Emoji, u: float, v: float) -> str:
    """One of the ways to ask for this picture; u and v in [0, 1) choose. Short ones are common, for users type short ones.

    v prefixes one in six with a word for the medium, so that a style's prefix ("neonglow style, ...") is no strange
    place for a prompt to start.
    """
    colours = " and ".join(emoji.colours)
    if u < 0.40 or not colours:
        text = emoji.name
    elif u < 0.55:
        text = emoji.short
    elif u < 0.70:
        text = f"{emoji.name}, {emoji.kind}"
    elif u < 0.90:
        text = f"{colours} {emoji.name}"
    else:
        text = f"{emoji.name}, {emoji.group}, {colours}"
    prefixes = ("emoji style, ", "sticker style, ", "icon of a ", "a ", "picture of a ", "plain style, ")
    return prefixes[int(v * 36)] + text if v < 1 / 6 else text


def all_captions(emoji: Emoji) -> list[str]:
    """Every form of caption(), for the tokenizer."""
    return [caption(emoji, u, v) for u in (0.0, 0.5, 0.6, 0.8, 0.95) for v in (0.01, 0.04, 0.07, 0.1, 0.13, 0.16, 0.9)]
