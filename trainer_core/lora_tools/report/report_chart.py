"""The chart of a LoRA's report."""

from __future__ import annotations

from PIL import Image

from ...plots.lora_chart import draw_lora_chart
from .examine import LoraReport


def draw_report(report: LoraReport) -> Image.Image:
    """Draw the size of the update in each block, and the rank that each layer needs."""
    ranks = list(report.ranks)
    rank = f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
    kinds = " and ".join(report.kinds) or "no adapter"
    needed = [(layer.needed_rank, layer.scale.rank) for layer in report.layers if layer.needed_rank and layer.norm]
    return draw_lora_chart(
        f"{report.name}: size of the update by block",
        f"{kinds}{rank}, {report.base.name}, written by {report.tool}",
        report.sizes(),
        [(inside, max(inside, own)) for inside, own in needed],
    )
