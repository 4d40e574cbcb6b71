"""The chart of peers.json: each trainer's time for a step as a multiple of ours, setting by setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chroma_trainer.trainer_core.plots.canvas import (
    AMBER,
    BLUE,
    INK,
    PAPER,
    ROSE,
    RULE,
    SOFT_INK,
    TEAL,
    text_width,
    write,
)
from chroma_trainer.trainer_core.plots.loss_chart import nice_ticks
from PIL import Image, ImageDraw

COLOURS = (AMBER, TEAL, ROSE, (132, 94, 194))
LEFT, RIGHT, TOP, BAR, GAP = 250, 90, 96, 20, 22
WIDTH = 1000


def label(run: dict[str, Any]) -> str:
    """A setting in words."""
    kept = "checkpointing" if run["checkpointing"] else "no checkpointing"
    return f"{run['size']}, batch {run['batch']}, {run['precision']}, {kept}"


def draw(runs: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """Bars from 0, with the least and the most of the rounds as a thin line; ours is the line at 1."""
    shown = [[name for name in names if name in run["trainers"]] for run in runs]
    heights = [BAR * (len(found) + 1) + GAP for found in shown]
    most = max(run["trainers"][name]["times_ours_least_and_most"][1] for run, found in zip(runs, shown, strict=True) for name in found)  # fmt: skip
    ticks = nice_ticks(0, most, 6)
    page = Image.new("RGB", (WIDTH, TOP + sum(heights) + 30), PAPER)
    pen = ImageDraw.Draw(page)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / ticks[-1]

    write(pen, (24, 20), "CPU seconds a step, times ours", 24, INK)
    write(pen, (24, 54), "right of the line: slower than ours; thin lines: least and most of the rounds", 15, SOFT_INK)
    bottom = TOP + sum(heights)
    for tick in ticks:
        pen.line((x(tick), TOP - 6, x(tick), bottom), fill=RULE)
        write(pen, (x(tick) - text_width(f"{tick:g}", 14) / 2, bottom + 4), f"{tick:g}", 14, SOFT_INK)
    y = TOP
    for run, found, height in zip(runs, shown, heights, strict=True):
        write(pen, (24, y), label(run), 15, INK)
        for i, name in enumerate(found):
            _bar(pen, x, y + BAR * (i + 1), name, run["trainers"][name], COLOURS[names.index(name) % len(COLOURS)])
        y += height
    pen.line((x(1), TOP - 6, x(1), bottom), fill=BLUE, width=3)
    page.save(path, optimize=True)


def _bar(pen: ImageDraw.ImageDraw, x: Any, top: int, name: str, told: dict[str, Any], colour: Any) -> None:
    least, most = told["times_ours_least_and_most"]
    middle = top + BAR // 2
    pen.rectangle((x(0), top + 3, x(told["times_ours"]), top + BAR - 3), fill=colour)
    pen.line((x(least), middle, x(most), middle), fill=INK)
    write(pen, (LEFT - 10 - text_width(name, 14), top + 1), name, 14, SOFT_INK)
    write(pen, (x(max(most, told["times_ours"])) + 6, top + 1), f"{told['times_ours']:.2f}", 14, INK)
