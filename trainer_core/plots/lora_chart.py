"""Chart of a LoRA's update: its size in each block of the model, and how much rank its layers need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from .canvas import BLUE, INK, PAPER, RULE, SOFT_INK, TEAL, Color, shapes, shorten, write

SIZE = (1280, 620)
LEFT, RIGHT, TOP, PLOT_HEIGHT = 60, 40, 130, 260
TITLE, LABEL, SMALL = 28, 17, 14
RANK_TOP, RANK_HEIGHT = 500, 60
COLORS: dict[str, Color] = {"double": BLUE, "single": TEAL}
GAP = 26  # pixels between double and single blocks


def draw_lora_chart(
    title: str, subtitle: str, sizes: Mapping[str, float], needed: Sequence[tuple[int, int]]
) -> Image.Image:
    """Draw the chart.

    Args:
        title: First line.
        subtitle: Second line.
        sizes: Norm of the update of each block ("double 3", "single 12"; others are left out).
        needed: For each layer the rank that holds 95 % of its update, and its rank.
    """
    page = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(page)
    width = SIZE[0] - LEFT - RIGHT
    write(draw, (LEFT, 26), shorten(title, TITLE, width), TITLE)
    write(draw, (LEFT, 68), shorten(subtitle, LABEL, width), LABEL, SOFT_INK)
    groups = [(kind, _values(sizes, kind)) for kind in COLORS]
    _draw_blocks(page, draw, [(kind, values) for kind, values in groups if values], width)
    if needed:
        _draw_ranks(page, draw, needed, width)
    return page


def _values(sizes: Mapping[str, float], kind: str) -> list[float]:
    by_index = {int(block.split()[1]): value for block, value in sizes.items() if block.startswith(f"{kind} ")}
    return [by_index.get(index, 0.0) for index in range(max(by_index, default=-1) + 1)]


def _draw_blocks(
    page: Image.Image, draw: ImageDraw.ImageDraw, groups: Sequence[tuple[str, list[float]]], width: int
) -> None:
    count, top = sum(len(values) for _, values in groups), max((max(values) for _, values in groups), default=0.0)
    if not count or not top:
        write(draw, (LEFT, TOP + PLOT_HEIGHT // 2), "no update", LABEL, SOFT_INK)
        return
    step, bottom, x = (width - GAP * (len(groups) - 1)) / count, TOP + PLOT_HEIGHT, float(LEFT)
    for kind, values in groups:
        box = (round(x), TOP, round(x + step * len(values)), bottom)

        def paint(
            brush: ImageDraw.ImageDraw, k: int, values: list[float] = values, color: Color = COLORS[kind]
        ) -> None:
            for index, value in enumerate(values):
                height = value / top * (PLOT_HEIGHT - 4)
                left, right = index * step * k + k, (index + 1) * step * k - k
                brush.rounded_rectangle(
                    (left, (PLOT_HEIGHT - height) * k, right, (PLOT_HEIGHT + 6) * k), 3 * k, fill=(*color, 200)
                )

        shapes(page, box, paint)
        draw.line((box[0], bottom, box[2], bottom), fill=RULE)
        for index in range(0, len(values), max(1, round(32 / step))):
            write(draw, (x + (index + 0.5) * step, bottom + 8), str(index), SMALL, SOFT_INK, "ma")
        write(draw, (box[0], bottom + 32), f"{kind} blocks", LABEL, INK)
        x += step * len(values) + GAP


def _draw_ranks(page: Image.Image, draw: ImageDraw.ImageDraw, needed: Sequence[tuple[int, int]], width: int) -> None:
    """Draw one thin bar per layer, sorted: the rank that is needed, in front of the rank that is there."""
    pairs, top = sorted(needed), max(rank for _, rank in needed)
    write(draw, (LEFT, RANK_TOP - 34), f"rank that holds 95 % of each layer's update (of {top})", LABEL, INK)

    def paint(brush: ImageDraw.ImageDraw, k: int) -> None:
        step = width * k / len(pairs)
        for index, (inside, rank) in enumerate(pairs):
            for value, alpha in ((rank, 60), (inside, 220)):
                box = (index * step, (1 - value / top) * RANK_HEIGHT * k, (index + 1) * step, RANK_HEIGHT * k)
                brush.rectangle(box, fill=(*BLUE, alpha))

    shapes(page, (LEFT, RANK_TOP, LEFT + width, RANK_TOP + RANK_HEIGHT), paint)
    write(draw, (LEFT, RANK_TOP + RANK_HEIGHT + 10), f"{len(pairs)} layers, sorted", SMALL, SOFT_INK)
