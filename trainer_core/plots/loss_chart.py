"""Chart of a run's loss and learning rate. Needs only Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .canvas import AMBER, BLUE, PAPER, ROSE, RULE, SOFT_INK, TEAL, Color, shapes, text_width, write

SIZE = (1280, 680)
LEFT, RIGHT, TOP, BOTTOM = 92, 92, 116, 78  # margins around the plot
TITLE, LABEL, SMALL = 28, 17, 15  # text sizes
OVERHANG = 8  # pixels by which dots and glyphs may extend beyond the plot
FEW_MARKERS = 60  # the lines of more markers would hide the plot
DOTS = ((100, 3.2, 130), (600, 2.4, 80), (math.inf, 1.7, 60))  # maximum number of steps, radius, alpha
MAX_POINTS = 4000  # more dots can't be distinguished
HALF_LIFE_SHARE = 0.02  # half-life of the smoothing, as a share of the run

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class StepPoint:
    """One optimizer step, counted from 1."""

    step: int
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class Marker:
    """Something that happened after a step.

    Attributes:
        step: The step.
        kind: "checkpoint" or "validation".
    """

    step: int
    kind: str


MARKER_COLORS: dict[str, Color] = {"checkpoint": TEAL, "validation": ROSE}


def smooth(values: Sequence[float], half_life: float) -> list[float]:
    """Exponential mean in both directions, which neither lags nor starts at 0:

    y_t = sum_s b^|t - s| x_s / sum_s b^|t - s|,   b = 2^(-1 / half_life)

    The last value is the one-sided mean with Adam's bias correction (Kingma and Ba 2015, arXiv:1412.6980).

    Args:
        values: Finite values.
        half_life: Distance, in values, at which a value has half the weight.
    """
    decay = 2 ** (-1 / half_life)
    before = _decay_sums(values, decay)
    after = _decay_sums(values[::-1], decay)[::-1]
    return [(a + b - x) / (v + w - 1) for x, (a, v), (b, w) in zip(values, before, after, strict=True)]


def _decay_sums(values: Sequence[float], decay: float) -> list[tuple[float, float]]:
    """(sum_{s <= t} b^(t - s) x_s, sum_{s <= t} b^(t - s)) for each t."""
    total, weight, sums = 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        sums.append((total, weight))
    return sums


def half_life_of(num_steps: int) -> float:
    """Return the half-life of the smoothing in steps: 2 % of the run, but at least 3."""
    return max(3.0, HALF_LIFE_SHARE * num_steps)


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return about `count` round numbers that cover low to high, spaced by 1, 2 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    raw = span / max(1, count - 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def draw_loss_chart(
    history: Sequence[StepPoint],
    markers: Sequence[Marker] = (),
    title: str = "Training loss",
    size: tuple[int, int] = SIZE,
) -> Image.Image:
    """Draw the loss of each step and its smoothed curve, the learning rate on a second axis, and markers for events.

    The loss axis covers 98 % of the steps. Outliers are drawn at its edge, so that they do not flatten the rest.

    Args:
        history: In order of steps; losses that are not finite are skipped.
        markers: Checkpoints and validations.
        title: Heading.
        size: Width and height in pixels.
    """
    points = [point for point in history if math.isfinite(point.loss)]
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    box = (LEFT, TOP, size[0] - RIGHT, size[1] - BOTTOM)
    write(draw, (LEFT, 26), title, TITLE)
    if not points:
        write(draw, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), "no steps yet", LABEL, SOFT_INK, "mm")
        return page
    smoothed = smooth([point.loss for point in points], half_life_of(len(points)))
    write(draw, (LEFT, 66), _summarize(points, smoothed), LABEL, SOFT_INK)

    losses = sorted(point.loss for point in points)
    low, high = losses[int(0.01 * (len(losses) - 1))], losses[math.ceil(0.99 * (len(losses) - 1))]
    margin = 0.0 if high - low > 1e-6 * abs(high) else 0.1 * abs(high)  # for losses that are all but equal
    loss_ticks = nice_ticks(low - margin, high + margin)
    rate_ticks = nice_ticks(0.0, max(point.learning_rate for point in points) * 1.05 or 1.0)
    first, last = points[0].step - 1, points[-1].step
    step_ticks = [t for t in nice_ticks(first, last, 9) if first <= t <= last and t == int(t)]

    width, height = box[2] - box[0], box[3] - box[1]
    steps = _Axis(first, last, 0, width)
    loss_axis = _Axis(loss_ticks[0], loss_ticks[-1], height, 0)
    rate_axis = _Axis(rate_ticks[0], rate_ticks[-1], height, 0)
    _draw_frame(draw, box, loss_ticks, loss_axis, step_ticks, steps)
    for tick in rate_ticks:
        write(draw, (box[2] + 12, box[1] + rate_axis(tick)), _format_rate(tick), SMALL, AMBER, "lm")
    write(draw, (box[0], box[1] - 12), "loss", SMALL, BLUE, "rs")
    write(draw, (box[2], box[1] - 12), "learning rate", SMALL, AMBER, "rs")
    write(draw, (box[2], box[3] + 40), "step", SMALL, SOFT_INK, "ra")

    def paint(brush: ImageDraw.ImageDraw, k: int) -> None:
        def place(step: float, value: float, axis: _Axis) -> tuple[float, float]:
            return (steps(step) + OVERHANG) * k, (min(max(axis(value), 0), height) + OVERHANG) * k

        radius, alpha = next((r * k, a) for limit, r, a in DOTS if len(points) <= limit)
        for point in points[:: math.ceil(len(points) / MAX_POINTS)]:
            x, y = place(point.step, point.loss, loss_axis)
            brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*BLUE, alpha))
        rates = [place(point.step, point.learning_rate, rate_axis) for point in points]
        _draw_polyline(brush, rates, (*AMBER, 255), 2 * k)
        curve = [place(point.step, value, loss_axis) for point, value in zip(points, smoothed, strict=True)]
        _draw_polyline(brush, curve, (*BLUE, 255), 3 * k)
        _draw_markers(brush, k, height, [m for m in markers if first <= m.step <= last], steps)

    shapes(page, _enlarge_box(box), paint)
    _draw_legend(page, draw, size[0] - RIGHT, [kind for kind in MARKER_COLORS if any(m.kind == kind for m in markers)])
    return page


class _Axis:
    """Linear map from values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.slope, self.start = low, (end - start) / (high - low), start

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.slope


def _summarize(points: Sequence[StepPoint], smoothed: Sequence[float]) -> str:
    return f"step {points[-1].step:,}   ·   smoothed loss {smoothed[0]:.4g} at the start, {smoothed[-1]:.4g} now"


def _draw_frame(
    draw: ImageDraw.ImageDraw, box: Box, y_ticks: Sequence[float], y: _Axis, x_ticks: Sequence[float], x: _Axis
) -> None:
    """Draw horizontal grid lines, and the labels of the left and bottom axes."""
    decimals = max(0, -math.floor(math.log10(y_ticks[1] - y_ticks[0]) + 1e-9))
    for tick in y_ticks:
        at = round(box[1] + y(tick))
        draw.line((box[0], at, box[2], at), fill=RULE)
        text = f"{tick:.{decimals}f}" if abs(tick) < 1e5 else f"{tick:.5g}"
        write(draw, (box[0] - 12, at), text, SMALL, SOFT_INK, "rm")
    for tick in x_ticks:
        at = round(box[0] + x(tick))
        draw.line((at, box[3], at, box[3] + 5), fill=RULE)
        write(draw, (at, box[3] + 12), f"{tick:,.10g}", SMALL, SOFT_INK, "ma")


def _enlarge_box(box: Box) -> Box:
    """Return the box enlarged for dots and glyphs on its edge."""
    return box[0] - OVERHANG, box[1] - OVERHANG, box[2] + OVERHANG, box[3] + OVERHANG


def _draw_polyline(
    brush: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], color: tuple[int, ...], width: int
) -> None:
    """Draw a line with round joints, reduced to as many points as can be seen."""
    visible = points[:: math.ceil(len(points) / MAX_POINTS)]
    visible = visible if visible[-1] == points[-1] else [*visible, points[-1]]
    brush.line(visible, fill=color, width=width, joint="curve")


def _draw_diamond(brush: ImageDraw.ImageDraw, x: float, y: float, r: float, color: Color) -> None:
    brush.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=(*color, 255))


def _draw_triangle(brush: ImageDraw.ImageDraw, x: float, y: float, r: float, color: Color) -> None:
    brush.polygon([(x - r, y + r * 0.8), (x + r, y + r * 0.8), (x, y - r)], fill=(*color, 255))


GLYPHS = {"checkpoint": _draw_triangle, "validation": _draw_diamond}


def _draw_markers(brush: ImageDraw.ImageDraw, k: int, height: int, markers: Sequence[Marker], steps: _Axis) -> None:
    """Draw a glyph for each marker on the bottom axis, and a faint vertical line if there are few."""
    bottom, radius = height + OVERHANG, 5.5 if len(markers) <= FEW_MARKERS else 3
    for marker in markers:
        x, color = (steps(marker.step) + OVERHANG) * k, MARKER_COLORS[marker.kind]
        if len(markers) <= FEW_MARKERS:
            brush.line((x, OVERHANG * k, x, bottom * k), fill=(*color, 56), width=k)
        shift = 0 if marker.kind == "checkpoint" else -11
        GLYPHS[marker.kind](brush, x, (bottom + shift) * k, radius * k, color)


def _draw_legend(page: Image.Image, draw: ImageDraw.ImageDraw, right: int, kinds: Sequence[str]) -> None:
    """Draw one line at the upper right, from right to left."""
    y = 44
    for name in reversed(["each step", "smoothed", "learning rate", *kinds]):
        x = right - text_width(name, SMALL)
        write(draw, (x, y), name, SMALL, SOFT_INK, "lm")
        left = round(x) - 28

        def paint(brush: ImageDraw.ImageDraw, k: int, name: str = name) -> None:
            if name in GLYPHS:
                GLYPHS[name](brush, 13 * k, 8 * k, 5.5 * k, MARKER_COLORS[name])
            elif name == "each step":
                brush.ellipse((10 * k, 5 * k, 16 * k, 11 * k), fill=(*BLUE, 100))
            else:
                color = BLUE if name == "smoothed" else AMBER
                width = 3 if name == "smoothed" else 2
                brush.line((3 * k, 8 * k, 21 * k, 8 * k), fill=(*color, 255), width=width * k)

        shapes(page, (left, y - 8, left + 26, y + 8), paint)
        right = left - 16


def _format_rate(rate: float) -> str:
    """Return the rate as 1e-4 rather than 0.0001."""
    if rate == 0:
        return "0"
    mantissa, exponent = f"{rate:.3g}".split("e") if "e" in f"{rate:.3g}" else f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if abs(int(exponent)) > 2 else f"{rate:g}"
