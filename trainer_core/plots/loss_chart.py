"""Pictures of a run: how the loss went, and which noise levels were trained. Pillow only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .canvas import AMBER, BLUE, PAPER, ROSE, RULE, SOFT_INK, TEAL, Colour, shapes, text_width, write

SIZE = (1280, 680)
LEFT, RIGHT, TOP, BOTTOM = 92, 92, 116, 78  # room around the plot
TITLE, LABEL, SMALL = 28, 17, 15  # text sizes
OVERHANG = 8  # pixels that dots and glyphs may stand out of the plot
FEW_MARKERS = 60  # with more, their lines would hide the plot
DOTS = ((100, 3.2, 130), (600, 2.4, 80), (math.inf, 1.7, 60))  # up to so many steps: radius, alpha
MAX_POINTS = 4000  # dots beyond this many can't be told apart
HALF_LIFE_SHARE = 0.02  # of the run: how far back the smoothed line looks

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class StepPoint:
    """One optimiser step, counted from 1."""

    step: int
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class Marker:
    """Something that happened after a step. kind: "checkpoint" or "validation"."""

    step: int
    kind: str


MARKER_COLOURS: dict[str, Colour] = {"checkpoint": TEAL, "validation": ROSE}


def smooth(values: Sequence[float], half_life: float) -> list[float]:
    """Exponential mean to both sides, so that it neither lags nor starts at 0:

    y_t = sum_s b^|t - s| x_s / sum_s b^|t - s|,   b = 2^(-1 / half_life)

    The last value is the one-sided mean with Adam's correction of its start (Kingma and Ba 2015, arXiv:1412.6980).

    Args:
        values: finite.
        half_life: in values; one so far away counts half.
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
    """Steps away at which a loss counts half in the smoothed line: 2 % of the run, at least 3."""
    return max(3.0, HALF_LIFE_SHARE * num_steps)


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart), from at or below low to at or above high."""
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
    """The loss of each step and its smoothed course, the learning rate on a second axis, and what happened when.

    The loss axis holds 98 % of the steps: a wild one sits at the edge, and the line with it; the rest isn't flattened.

    Args:
        history: in order of steps; losses that are not finite are left out.
        markers: checkpoints and validations.
        size: width and height in pixels.
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
    write(draw, (LEFT, 66), _summary(points, smoothed), LABEL, SOFT_INK)

    losses = sorted(point.loss for point in points)
    low, high = losses[int(0.01 * (len(losses) - 1))], losses[math.ceil(0.99 * (len(losses) - 1))]
    margin = 0.0 if high - low > 1e-6 * abs(high) else 0.1 * abs(high)  # all but equal losses have no span of their own
    loss_ticks = nice_ticks(low - margin, high + margin)
    rate_ticks = nice_ticks(0.0, max(point.learning_rate for point in points) * 1.05 or 1.0)
    first, last = points[0].step - 1, points[-1].step
    step_ticks = [t for t in nice_ticks(first, last, 9) if first <= t <= last and t == int(t)]

    width, height = box[2] - box[0], box[3] - box[1]
    steps = _Axis(first, last, 0, width)
    loss_axis = _Axis(loss_ticks[0], loss_ticks[-1], height, 0)
    rate_axis = _Axis(rate_ticks[0], rate_ticks[-1], height, 0)
    _frame(draw, box, loss_ticks, loss_axis, step_ticks, steps)
    for tick in rate_ticks:
        write(draw, (box[2] + 12, box[1] + rate_axis(tick)), _rate_text(tick), SMALL, AMBER, "lm")
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
        _polyline(brush, rates, (*AMBER, 255), 2 * k)
        curve = [place(point.step, value, loss_axis) for point, value in zip(points, smoothed, strict=True)]
        _polyline(brush, curve, (*BLUE, 255), 3 * k)

    shapes(page, _grow(box), paint)
    _markers(page, box, [m for m in markers if first <= m.step <= last], steps)
    _legend(page, draw, size[0] - RIGHT, [kind for kind in MARKER_COLOURS if any(m.kind == kind for m in markers)])
    return page


class _Axis:
    """Straight map of values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.slope, self.start = low, (end - start) / (high - low), start

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.slope


def _summary(points: Sequence[StepPoint], smoothed: Sequence[float]) -> str:
    return f"step {points[-1].step:,}   ·   smoothed loss {smoothed[0]:.4g} at the start, {smoothed[-1]:.4g} now"


def _frame(
    draw: ImageDraw.ImageDraw, box: Box, y_ticks: Sequence[float], y: _Axis, x_ticks: Sequence[float], x: _Axis
) -> None:
    """Horizontal rules and the labels of the left and the lower axis."""
    places = max(0, -math.floor(math.log10(y_ticks[1] - y_ticks[0]) + 1e-9))
    for tick in y_ticks:
        at = round(box[1] + y(tick))
        draw.line((box[0], at, box[2], at), fill=RULE)
        text = f"{tick:.{places}f}" if abs(tick) < 1e5 else f"{tick:.5g}"
        write(draw, (box[0] - 12, at), text, SMALL, SOFT_INK, "rm")
    for tick in x_ticks:
        at = round(box[0] + x(tick))
        draw.line((at, box[3], at, box[3] + 5), fill=RULE)
        write(draw, (at, box[3] + 12), f"{tick:,.10g}", SMALL, SOFT_INK, "ma")


def _grow(box: Box) -> Box:
    """The box with room for dots and glyphs that lie on its edge."""
    return box[0] - OVERHANG, box[1] - OVERHANG, box[2] + OVERHANG, box[3] + OVERHANG


def _polyline(
    brush: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: tuple[int, ...], width: int
) -> None:
    """A line with round joints, thinned out to what can be seen."""
    kept = points[:: math.ceil(len(points) / MAX_POINTS)]
    kept = kept if kept[-1] == points[-1] else [*kept, points[-1]]
    brush.line(kept, fill=colour, width=width, joint="curve")


def _diamond(brush: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    brush.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=(*colour, 255))


def _triangle(brush: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    brush.polygon([(x - r, y + r * 0.8), (x + r, y + r * 0.8), (x, y - r)], fill=(*colour, 255))


GLYPHS = {"checkpoint": _triangle, "validation": _diamond}


def _markers(page: Image.Image, box: Box, markers: Sequence[Marker], steps: _Axis) -> None:
    """A glyph for each on the lower axis, and a faint line up while there are few."""

    def paint(brush: ImageDraw.ImageDraw, k: int) -> None:
        bottom = box[3] - box[1] + OVERHANG
        radius = 5.5 if len(markers) <= FEW_MARKERS else 3
        for marker in markers:
            x, colour = (steps(marker.step) + OVERHANG) * k, MARKER_COLOURS[marker.kind]
            if len(markers) <= FEW_MARKERS:
                brush.line((x, OVERHANG * k, x, bottom * k), fill=(*colour, 56), width=k)
            shift = 0 if marker.kind == "checkpoint" else -11
            GLYPHS[marker.kind](brush, x, (bottom + shift) * k, radius * k, colour)

    shapes(page, _grow(box), paint)


def _legend(page: Image.Image, draw: ImageDraw.ImageDraw, right: int, kinds: Sequence[str]) -> None:
    """One line at the upper right, from the right to the left."""
    y = 44
    for name in reversed(["each step", "smoothed", "learning rate", *kinds]):
        x = right - text_width(name, SMALL)
        write(draw, (x, y), name, SMALL, SOFT_INK, "lm")
        left = round(x) - 28

        def paint(brush: ImageDraw.ImageDraw, k: int, name: str = name) -> None:
            if name in GLYPHS:
                GLYPHS[name](brush, 13 * k, 8 * k, 5.5 * k, MARKER_COLOURS[name])
            elif name == "each step":
                brush.ellipse((10 * k, 5 * k, 16 * k, 11 * k), fill=(*BLUE, 100))
            else:
                colour = BLUE if name == "smoothed" else AMBER
                width = 3 if name == "smoothed" else 2
                brush.line((3 * k, 8 * k, 21 * k, 8 * k), fill=(*colour, 255), width=width * k)

        shapes(page, (left, y - 8, left + 26, y + 8), paint)
        right = left - 16


def _rate_text(rate: float) -> str:
    """1e-4 rather than 0.0001."""
    if rate == 0:
        return "0"
    mantissa, exponent = f"{rate:.3g}".split("e") if "e" in f"{rate:.3g}" else f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if abs(int(exponent)) > 2 else f"{rate:g}"
