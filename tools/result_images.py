"""Writes images that show results, from the validation images of a run: `python tools/result_images.py RUN_FOLDER [--check]`

    workflows/NAME.jpg        thumbnails of the templates in THUMBNAILS: before and after, not the graph
    docs/images/icon.png      the icon in ComfyUI's registry
    docs/images/banner.jpg    the banner there, 21:9

RUN_FOLDER is that of a run with named prompts, such as demo-output/chroma_trainer/neonglow-XXXXXXXX after `make demo`. Look at the images
afterwards. --check only says what the folder lacks.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from chroma_trainer.trainer_core.plots.canvas import round_corners
from chroma_trainer.trainer_core.plots.image_grid import GAP, LABEL_WIDTH, MARGIN, RADIUS, fit
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS, IMAGES = ROOT / "workflows", ROOT / "docs" / "images"
BACKGROUND, INK = (18, 18, 24), (236, 236, 240)
THUMBNAIL, BANNER, ICON = (640, 640), (1260, 540), (400, 400)
FILE = re.compile(r"(?P<name>.+)-step-(?P<step>\d{6})-(?P<width>\d+)x(?P<height>\d+)\.png")
BEFORE, AFTER = 0, -1  # indices of a run's steps


@dataclass(frozen=True)
class Sheet:
    """A grid of validation images: a row for each prompt, a column for each step.

    Args:
        prompts: names of prompts, from top to bottom.
        steps: indices into the run's steps, from left to right. Between two of them there is an arrow.
    """

    prompts: tuple[str, ...]
    steps: tuple[int, ...] = (BEFORE, AFTER)


# The demo's prompts, each with the sentence of the template in mind. The other templates show something else than a LoRA's effect.
THUMBNAILS = {
    "first-lora": Sheet(("smiling face", "heart")),
    "quick-lora": Sheet(("car", "smiling face")),
    "style-with-regularisation": Sheet(("smiling face", "smiling face, no trigger")),
    "compare-checkpoints": Sheet(("smiling face", "heart", "car"), (0, 1, -1)),
    "train-then-sample": Sheet(("cactus", "heart")),
}
BANNER_PROMPTS, ICON_PROMPT = ("smiling face", "heart", "cactus", "car"), "smiling face"


def result_files(folder: Path) -> dict[str, dict[int, Path]]:
    """Return the files of a run's validation images: name of the prompt -> step -> file."""
    files: dict[str, dict[int, Path]] = {}
    for path in sorted((folder / "validation" / "by-name").glob("*.png")):
        if match := FILE.fullmatch(path.name):
            files.setdefault(match["name"], {})[int(match["step"])] = path
    return files


def missing(files: dict[str, dict[int, Path]]) -> list[str]:
    """Return what the images need and the run lacks."""
    prompts = {prompt for sheet in THUMBNAILS.values() for prompt in sheet.prompts} | {*BANNER_PROMPTS, ICON_PROMPT}
    lines = [f"no validation images of a prompt named {name!r}" for name in sorted(prompts - files.keys())]
    few = sorted(name for name in prompts & files.keys() if len(files[name]) < 3)
    return lines + [f"{name!r} has images of {len(files[name])} steps; three are needed" for name in few]


def pick(files: dict[str, dict[int, Path]], prompt: str, index: int) -> Image.Image:
    """Return the image of the last column, which is the LoRA at its highest strength, or the base before the training."""
    path = files[prompt][sorted(files[prompt])[index]]
    match = FILE.fullmatch(path.name)
    assert match
    cell = fit(np.zeros((int(match["height"]), int(match["width"]), 3)))
    page = Image.open(path).convert("RGB")
    left = MARGIN + LABEL_WIDTH + GAP
    columns = (page.width - MARGIN - left + GAP) // (cell.width + GAP)
    x, y = left + (columns - 1) * (cell.width + GAP), page.height - MARGIN - cell.height
    return page.crop((x, y, x + cell.width, y + cell.height))


def draw_sheet(rows: Sequence[Sequence[Image.Image]], size: tuple[int, int], signs: str = "") -> Image.Image:
    """Return images in rows as large as fit, with an arrow between neighbors of a row, or with the signs, of + and =."""
    columns, width, height = len(rows[0]), *size
    gap = round(0.11 * min(width / columns, height / len(rows)))
    edge = min((width - gap * (columns + 1)) // columns, (height - gap * (len(rows) + 1)) // len(rows))
    left, top = (
        (width - columns * edge - (columns - 1) * gap) // 2,
        (height - len(rows) * edge - (len(rows) - 1) * gap) // 2,
    )
    canvas = Image.new("RGB", size, BACKGROUND)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            at = (left + x * (edge + gap), top + y * (edge + gap))
            corners = round_corners((edge, edge), 1 + round(RADIUS * edge / image.width))
            canvas.paste(image.resize((edge, edge), Image.Resampling.LANCZOS), at, corners)
            if x:
                draw_sign(canvas, at[0] - gap / 2, at[1] + edge / 2, 0.3 * gap, signs[x - 1] if signs else ">")
    return canvas


def draw_sign(canvas: Image.Image, x: float, y: float, half: float, sign: str) -> None:
    """Draw > (as a triangle), + or = with its center at (x, y)."""
    draw, thick = ImageDraw.Draw(canvas), half / 4
    if sign == ">":
        draw.polygon([(x - half, y - half), (x + half, y), (x - half, y + half)], fill=INK)
        return
    for bar in (y,) if sign == "+" else (y - half / 2, y + half / 2):
        draw.rectangle((x - half, bar - thick, x + half, bar + thick), fill=INK)
    if sign == "+":
        draw.rectangle((x - thick, y - half, x + thick, y + half), fill=INK)


def draw_icon(before: Image.Image, after: Image.Image) -> Image.Image:
    """Return an image that is before on one side of its diagonal, and after on the other."""
    before, after = (image.resize(ICON, Image.Resampling.LANCZOS) for image in (before, after))
    mask = Image.new("L", ICON, 0)
    ImageDraw.Draw(mask).polygon([(ICON[0] * 0.62, 0), (ICON[0], 0), ICON, (ICON[0] * 0.38, ICON[1])], fill=255)
    return Image.composite(after, before, mask)


def write(folder: Path, workflows: Path = WORKFLOWS, images: Path = IMAGES) -> list[Path]:
    """Write all images from a run, and return their paths."""
    files, paths = result_files(folder), []
    for name, sheet in THUMBNAILS.items():
        rows = [[pick(files, prompt, step) for step in sheet.steps] for prompt in sheet.prompts]
        paths.append(workflows / f"{name}.jpg")
        draw_sheet(rows, THUMBNAIL).save(paths[-1], quality=88, optimize=True)
    pairs = [[pick(files, prompt, step) for prompt in BANNER_PROMPTS] for step in (BEFORE, AFTER)]
    paths += [images / "banner.jpg", images / "icon.png"]
    draw_banner(*pairs).save(paths[-2], quality=90, optimize=True)
    draw_icon(pick(files, ICON_PROMPT, BEFORE), pick(files, ICON_PROMPT, AFTER)).save(paths[-1], optimize=True)
    return paths


def draw_banner(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> Image.Image:
    """Return a row of images before the training, over the same after it."""
    canvas = Image.new("RGB", BANNER, BACKGROUND)
    columns = [
        draw_sheet([[top], [bottom]], (BANNER[0] // len(before), BANNER[1]))
        for top, bottom in zip(before, after, strict=True)
    ]
    for i, column in enumerate(columns):
        canvas.paste(column, (i * BANNER[0] // len(columns), 0))
    return canvas


def main(arguments: list[str]) -> int:
    folders = [Path(argument) for argument in arguments if not argument.startswith("--")]
    if len(folders) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    faults = missing(result_files(folders[0]))
    for fault in faults:
        print(f"{folders[0]}: {fault}", file=sys.stderr)
    if faults or "--check" in arguments:
        return int(bool(faults))
    for path in write(folders[0]):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
