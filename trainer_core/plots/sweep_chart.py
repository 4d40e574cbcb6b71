"""Chart of a sweep: how far each run's held-out loss is above the best one, with its error, the leak and the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .canvas import AMBER, BLUE, INK, PAPER, ROSE, RULE, SOFT_INK, TEAL, Color, shapes, shorten, write

LABEL_WIDTH, PANEL_WIDTH, GAP, EDGE = 330, 300, 40, 40
TOP, ROW, BOTTOM = 130, 40, 50
TITLE, TEXT, SMALL = 26, 16, 14
Estimate = tuple[float, float]


@dataclass(frozen=True)
class SweepBar:
    """One run.

    Attributes:
        label: Its values.
        loss: Held-out loss; None where it was not measured.
        difference: From the best run, with its standard error; None for the best one.
        is_best: Whether it is the best one.
        is_worse: Whether it is worse with 95 % certainty.
        leak: Leak without the trigger, with its standard error.
        seconds: Time of its steps.
        is_stopped: Whether it was ended early.
    """

    label: str
    loss: float | None
    difference: Estimate | None
    is_best: bool
    is_worse: bool
    leak: Estimate | None
    seconds: float | None
    is_stopped: bool


def draw_sweep_chart(bars: Sequence[SweepBar], title: str) -> Image.Image:
    """Draw the chart: one row a run, and a panel for each of the three figures."""
    width = EDGE * 2 + LABEL_WIDTH + 3 * (PANEL_WIDTH + GAP)
    page = Image.new("RGB", (width, TOP + ROW * max(1, len(bars)) + BOTTOM), PAPER)
    draw = ImageDraw.Draw(page)
    write(draw, (EDGE, 24), shorten(title, TITLE, width - 2 * EDGE), TITLE)
    write(draw, (EDGE, 62), "lines: standard error; of the loss, that of the paired differences", TEXT, SOFT_INK)
    for number, bar in enumerate(bars):
        y = TOP + ROW * number + ROW // 2
        draw.line((EDGE, y + ROW // 2, width - EDGE, y + ROW // 2), fill=RULE)
        suffix = " (stopped early)" if bar.is_stopped else ""
        label = shorten(f"{bar.label}{suffix}", TEXT, LABEL_WIDTH - 12)
        write(draw, (EDGE, y), label, TEXT, INK if not bar.is_worse else SOFT_INK, "lm")
    panels = (
        ("held-out loss above the best", [_loss(bar) for bar in bars], _loss_text),
        ("leak without the trigger", [(bar.leak, AMBER) for bar in bars], lambda bar: _text(bar.leak, "{:.2f}")),
        ("time of its steps", [_time(bar) for bar in bars], lambda bar: _duration(bar.seconds)),
    )
    for number, (name, values, text) in enumerate(panels):
        left = EDGE + LABEL_WIDTH + GAP + number * (PANEL_WIDTH + GAP)
        _draw_panel(page, draw, left, name, values, [text(bar) for bar in bars])
    return page


def _loss(bar: SweepBar) -> tuple[Estimate | None, Color]:
    if bar.is_best:
        return (0.0, 0.0), TEAL
    return bar.difference, ROSE if bar.is_worse else BLUE


def _time(bar: SweepBar) -> tuple[Estimate | None, Color]:
    return (None if bar.seconds is None else (bar.seconds, 0.0)), SOFT_INK


def _loss_text(bar: SweepBar) -> str:
    if bar.loss is None:
        return "-"
    return f"{bar.loss:.4f}, best" if bar.is_best else _text(bar.difference, "{:+.4f}")


def _text(value: Estimate | None, form: str) -> str:
    return "-" if value is None else form.format(value[0])


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.1f} min"
        if seconds >= 60
        else f"{seconds:.1f} s"
    )


def _draw_panel(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    left: int,
    name: str,
    values: Sequence[tuple[Estimate | None, Color]],
    texts: Sequence[str],
) -> None:
    write(draw, (left, TOP - 26), name, TEXT, INK)
    known = [value for value, _ in values if value is not None]
    low = min([0.0, *(mean - error for mean, error in known)])
    high = max([*(mean + error for mean, error in known), low]) if known else 0.0
    scale = (PANEL_WIDTH - 100) / ((high - low) or 1.0)
    zero = left - low * scale
    for number, (value, color) in enumerate(values):
        top = TOP + ROW * number
        if value is not None:
            box = (left - GAP // 2, top, left + PANEL_WIDTH, top + ROW)
            shapes(page, box, _painter(value, color, zero - box[0], scale))
        x = left + PANEL_WIDTH - 92
        write(draw, (x, top + ROW // 2), texts[number], SMALL, SOFT_INK, "lm")


def _painter(value: Estimate, color: Color, zero: float, scale: float) -> Callable[[ImageDraw.ImageDraw, int], None]:
    mean, error = value

    def paint(brush: ImageDraw.ImageDraw, k: int) -> None:
        middle, end = ROW * k / 2, (zero + mean * scale) * k
        start, stop = sorted((zero * k, end))
        brush.rectangle((start, middle - 3 * k, max(stop, start + k), middle + 3 * k), fill=(*color, 90))
        brush.line(
            ((zero + (mean - error) * scale) * k, middle, (zero + (mean + error) * scale) * k, middle),
            fill=color,
            width=2 * k,
        )
        brush.ellipse((end - 5 * k, middle - 5 * k, end + 5 * k, middle + 5 * k), fill=color)

    return paint
