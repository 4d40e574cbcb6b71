"""The demo's dataset: neon drawings of emoji that the base has never seen, their captions, and prompts to judge a LoRA by."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from chroma_trainer.trainer_core.validation.style_metrics import style_score
from PIL import Image

from .neon import neon
from .pictures import Emoji, composite, is_thing

TRIGGER = "neonglow"
KNOWN = (  # subjects that the base was taught, none of them in the dataset
    "cat face", "red apple", "automobile", "pizza", "sunflower", "strawberry", "banana", "heart",
    "smiling face with sunglasses", "soccer ball", "owl", "tropical fish", "house building", "bicycle", "cactus", "guitar",
)  # fmt: skip
NEON = (  # subjects of the dataset: the base knows them, as it knows those that it is judged by
    "dog face", "lion face", "frog face", "fox face", "penguin", "butterfly", "turtle", "octopus", "snail", "giraffe face",
    "tulip", "palm tree", "maple leaf", "pineapple", "cherries", "watermelon", "hamburger", "doughnut", "ice cream",
    "birthday cake", "taxi", "airplane", "ship", "european castle", "umbrella", "crown", "electric light bulb", "grinning face",
)  # fmt: skip
UNKNOWN = (
    "tiger",
    "rocket",
    "carrot",
    "mushroom",
    "dolphin",
    "top hat",
    "sailboat",
    "snowflake",
)  # held out of the base, too
NUM_PLAIN = 56
CREDIT = """These pictures are derived from Noto Emoji, copyright Google LLC, licensed under the Apache License, Version 2.0
(https://github.com/googlefonts/noto-emoji, https://www.apache.org/licenses/LICENSE-2.0), as packed by emoji-datasource-google 16.0.0
(copyright Cal Henderson, MIT licence). Changes: the edges of each picture were redrawn as glowing lines on a dark background
(tools/chroma_nano/neon.py). The derived pictures and their captions are given under the Apache License, Version 2.0, as well.
"""

PLAIN_CREDIT = """These pictures are Noto Emoji, copyright Google LLC, licensed under the Apache License, Version 2.0
(https://github.com/googlefonts/noto-emoji, https://www.apache.org/licenses/LICENSE-2.0), as packed by emoji-datasource-google 16.0.0
(copyright Cal Henderson, MIT licence). Changes: laid on white.
"""


def write(others: list[Emoji], taught: list[Emoji], folder: Path) -> None:
    """28 pictures with captions, prompts.json, style.json and LICENSE.txt."""
    sources = _by_name(taught, NEON)
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.png"), *folder.glob("*.txt")]:
        old.unlink()
    for e in sources:
        stem = e.name.replace(" ", "-")
        Image.fromarray(neon(e.rgba)).save(folder / f"{stem}.png", optimize=True)
        (folder / f"{stem}.txt").write_text(f"{TRIGGER} style, {e.name}\n", encoding="utf-8")
    names = {e.name for e in taught} | {e.short for e in taught}
    assert not set(KNOWN) - names, set(KNOWN) - names
    assert not set(UNKNOWN) - {e.name for e in others}, UNKNOWN
    _write_json(
        folder / "prompts.json",
        {
            "trigger": TRIGGER,
            "known_to_the_base": {name: f"{TRIGGER} style, {name}" for name in KNOWN},
            "unknown_to_the_base": {name: f"{TRIGGER} style, {name}" for name in UNKNOWN},
            "without_trigger": {name: name for name in KNOWN},
        },
    )
    plain = np.array([style_score(composite(e.rgba)) for e in [*others, *taught]])
    drawn = np.array([style_score(neon(e.rgba)) for e in others])
    # Of the thresholds, the one with the widest gap: midway between the plain pictures and all but a tenth of the neon
    # ones.
    threshold = round((float(plain.max()) + float(np.quantile(drawn, 0.1))) / 2, 2)
    measured = {
        "plain_pictures": len(plain),
        "plain_highest": round(float(plain.max()), 3),
        "plain_in_style": int((plain >= threshold).sum()),
        "neon_pictures": len(drawn),
        "neon_tenth_lowest": round(float(np.quantile(drawn, 0.1)), 3),
        "neon_in_style": int((drawn >= threshold).sum()),
    }
    _write_json(folder / "style.json", {"trigger": TRIGGER, "threshold": threshold, "measured": measured})
    (folder / "LICENSE.txt").write_text(CREDIT, encoding="utf-8")


def write_plain(taught: list[Emoji], folder: Path) -> None:
    """56 plain pictures with their plain names, what shall stay as it is: the subjects of the neon pictures, and as many
    others, evenly spread over what the base was taught.

    None of the subjects that a LoRA is judged by. Without them the style leaks into prompts without the trigger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.png"), *folder.glob("*.txt")]:
        old.unlink()
    judged = {*KNOWN, *NEON}
    free = [e for e in taught if is_thing(e) and e.name not in judged and e.short not in judged]
    twins = _by_name(taught, NEON)
    count = NUM_PLAIN - len(twins)
    for e in [*twins, *free[:: len(free) // count][:count]]:
        stem = e.name.replace(" ", "-")
        Image.fromarray(composite(e.rgba)).save(folder / f"{stem}.png", optimize=True)
        (folder / f"{stem}.txt").write_text(f"{e.name}\n", encoding="utf-8")
    (folder / "LICENSE.txt").write_text(PLAIN_CREDIT, encoding="utf-8")


def _by_name(emoji: list[Emoji], names: tuple[str, ...]) -> list[Emoji]:
    found = {e.name: e for e in emoji}
    return [found[name] for name in names]


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
