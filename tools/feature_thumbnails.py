"""Writes the thumbnails of templates that show something else than the demo's LoRA; each shows a result, not a graph:

    python tools/feature_thumbnails.py kontext-pairs               pairs of images as the template makes them, before and after
    python tools/feature_thumbnails.py full-rank RUN_FOLDER        the base, and chroma-nano trained whole on the demo's images
    python tools/feature_thumbnails.py merge-loras A B MERGED      images of two LoRAs, and of both in one, from the same noise

A is the demo's LoRA, B one that was trained on assets/zibbo in the same way (500 steps), MERGED `chroma-trainer lora merge A B`.
Look at the images afterwards. The thumbnails of the demo's LoRA: tools/result_images.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from chroma_trainer.trainer_core.config.degradation import steps_of
from chroma_trainer.trainer_core.data.degradation import degrade
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.result_images import AFTER, BEFORE, ROOT, THUMBNAIL, WORKFLOWS, draw_sheet, pick, result_files

PAIRS = ("lion-face", "european-castle")
DEGRADATION = "shrink 2 + jpeg 20"  # within the ranges of the template, for images of 64 pixels
FULL_RANK_PROMPTS = ("cactus", "heart")
MERGED_PROMPTS, MERGED_SEED = ("zibbo", "neonglow style, heart"), 1


def kontext_pairs() -> list[list[Image.Image]]:
    rows = []
    for name in PAIRS:
        after = Image.open(ROOT / "assets" / "neon-emoji" / f"{name}.png").convert("RGB")
        rows.append([degrade(after, steps_of(DEGRADATION), name), after])
    return rows


def full_rank(folder: str) -> list[list[Image.Image]]:
    files = result_files(Path(folder))
    return [[pick(files, prompt, step) for step in (BEFORE, AFTER)] for prompt in FULL_RANK_PROMPTS]


def merge_loras(*loras: str) -> list[list[Image.Image]]:
    from tools.chroma_nano.sampler import Sampler

    columns: list[np.ndarray] = []
    for lora in loras:
        columns.append(Sampler(ROOT / "assets" / "chroma-nano", Path(lora)).images(MERGED_PROMPTS, seed=MERGED_SEED))
    return [[Image.fromarray(column[row]) for column in columns] for row in range(len(MERGED_PROMPTS))]


TEMPLATES: dict[str, tuple[Callable[..., Sequence[Sequence[Image.Image]]], int]] = {
    "kontext-pairs": (kontext_pairs, 0),
    "full-rank": (full_rank, 1),
    "merge-loras": (merge_loras, 3),
}
SIGNS = {"merge-loras": "+="}


def main(arguments: list[str]) -> int:
    name, *paths = arguments or [""]
    draw, num_paths = TEMPLATES.get(name, (None, 0))
    if draw is None or len(paths) != num_paths:
        print(__doc__, file=sys.stderr)
        return 2
    path = WORKFLOWS / f"{name}.jpg"
    draw_sheet(draw(*paths), THUMBNAIL, SIGNS.get(name, "")).save(path, quality=88, optimize=True)
    print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
