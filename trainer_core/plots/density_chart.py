"""The sigma density of a run, as a chart and as text."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw

from ..flow.sigma_density import density as density_of
from .canvas import BLUE, PAPER, ROSE, SOFT_INK, shapes, shorten, write
from .loss_chart import BOTTOM, LABEL, LEFT, SMALL, TITLE, TOP, _Axis, _draw_frame, nice_ticks

BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII_BLOCKS = " ..::-=+#"


def bin_shares(name: str, shift: float, num_bins: int) -> list[float]:
    """Return the exact share of samples in each of num_bins equal parts of [0, 1], from the CDF."""
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
    return density_of(name, shift).cdf(edges).diff().tolist()


def draw_density(name: str, shift: float = 1.0, size: tuple[int, int] = (1280, 520)) -> Image.Image:
    """Draw the histogram of the density, with its quartiles.

    Args:
        name: Name of the density, from config.training.SIGMA_DENSITIES.
        shift: As in the training settings.
        size: Width and height in pixels.
    """
    num_bins = 50
    heights = [share * num_bins for share in bin_shares(name, shift, num_bins)]
    quartiles = density_of(name, shift).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    box = (LEFT, TOP, size[0] - LEFT // 2, size[1] - BOTTOM)
    shifted = "" if shift == 1 else f", shift {shift:g}"
    write(draw, (LEFT, 26), f"Noise levels (sigma) in training: {name}{shifted}", TITLE)
    subtitle = "a quarter below {:.3f}   ·   half below {:.3f}   ·   a quarter above {:.3f}".format(*quartiles)
    warning = density_of(name, shift).warning
    subtitle = shorten(warning.split(";")[0], LABEL, size[0] - 2 * LEFT) or subtitle
    write(draw, (LEFT, 66), subtitle, LABEL, ROSE if warning else SOFT_INK)
    ticks = nice_ticks(0, max(heights), 5)
    x, y = _Axis(0, 1, 0, box[2] - box[0]), _Axis(0, ticks[-1], box[3] - box[1], 0)
    _draw_frame(draw, box, ticks, y, [i / 10 for i in range(11)], x)
    write(draw, (box[0], box[3] + 40), "sigma 0: the image", SMALL, SOFT_INK, "la")
    write(draw, (box[2], box[3] + 40), "sigma 1: pure noise", SMALL, SOFT_INK, "ra")

    radius = 3

    def paint(brush: ImageDraw.ImageDraw, k: int) -> None:
        for i, value in enumerate(heights):
            below = y(0) + 2 * radius  # puts the lower corners outside the canvas
            bar = (x(i / num_bins) * k + k, y(value) * k, x((i + 1) / num_bins) * k - k, below * k)
            if value > 0:
                brush.rounded_rectangle(bar, radius * k, fill=(*BLUE, 150))
        for quartile in quartiles:
            at = x(quartile) * k
            brush.line((at, 0, at, y(0) * k), fill=(*ROSE, 170), width=2 * k)

    shapes(page, box, paint)
    return page


def density_text(name: str, shift: float = 1.0, width: int = 50, height: int = 6, ascii_only: bool = False) -> str:
    """Return the same histogram as text, `height` lines high and `width` columns wide, above an axis.

    Args:
        name: Name of the density.
        shift: As in the training settings.
        width: In characters.
        height: In lines.
        ascii_only: For consoles that can't show block characters.
    """
    shares = bin_shares(name, shift, width)
    blocks, top = ASCII_BLOCKS if ascii_only else BLOCKS, max(shares)
    levels = [max(int(share > 0), round(share / top * height * 8)) for share in shares]
    lines = ["".join(blocks[min(8, max(0, level - 8 * row))] for level in levels) for row in range(height - 1, -1, -1)]
    axis = "0 image" + "noise 1".rjust(width - len("0 image"))
    return "\n".join([*(line.rstrip() for line in lines), ("-" if ascii_only else "─") * width, axis])
