"""The report of a LoRA as lines of text, with a chart of characters."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ...plots.text_bars import text_bars
from ..block_strengths import OUTSIDE
from .examine import ERROR, NOTE, WARNING, LayerReport, LoraReport

MARKS = {ERROR: "!!", WARNING: "! ", NOTE: "- "}
CHART_HEIGHT = 6


def report_text(report: LoraReport, ascii_only: bool = False) -> str:
    """Return the report.

    Args:
        report: The report.
        ascii_only: Leave out characters that a console may lack.
    """
    lines = [
        report.name,
        f"  written by  {report.tool} ({report.evidence})",
        f"  kind        {_kind_text(report)}",
        f"  base        {report.base.name}: {report.base.reason}",
    ]
    if report.trigger:
        lines.append(f"  trigger     {report.trigger}")
    for program, keys in report.unloaded.items():
        lines.append(f"  {program:<11} loads {report.num_keys - len(keys)} of {report.num_keys} keys")
    lines += _size_lines(report, ascii_only)
    if report.findings:
        lines += ["", *(f"  {MARKS[finding.severity]} {finding.text}" for finding in report.findings)]
    else:
        lines += ["", "  nothing is wrong with it"]
    return "\n".join(lines)


def _kind_text(report: LoraReport) -> str:
    kinds = ", ".join(f"{count} layers of {kind}" for kind, count in report.kinds.items()) or "no adapter"
    ranks = list(report.ranks)
    parts = [kinds]
    if ranks:
        parts.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}")
    scales = sorted({layer.scale.meant for layer in report.layers if layer.scale.rank})
    if scales:
        parts.append(f"scale {scales[0]:g}" if len(scales) == 1 else f"scales {scales[0]:g} to {scales[-1]:g}")
    return ", ".join([*parts, *report.dtypes])


def _size_lines(report: LoraReport, ascii_only: bool) -> list[str]:
    sizes = report.sizes()
    total = sum(value**2 for value in sizes.values()) ** 0.5
    if not total:
        return []
    largest = sorted(sizes, key=lambda block: -sizes[block])[:3]
    shares = ", ".join(f"{block} ({sizes[block] ** 2 / total**2:.0%})" for block in largest)
    lines = [f"  size        {total:.4g}, most of it in {shares}"]
    lines += _rank_lines(report.layers)
    inside = {block: value for block, value in sizes.items() if block != OUTSIDE}
    if len(inside) > 1:
        lines += ["", *(f"  {line}" for line in text_bars(_columns(inside), CHART_HEIGHT, ascii_only))]
    return lines


def _rank_lines(layers: Sequence[LayerReport]) -> list[str]:
    needed = [layer.needed_rank for layer in layers if layer.needed_rank and layer.norm]
    if not needed:
        return []
    median = statistics.median_high(needed)
    return [f"  spectrum    95 % of a layer's update fits rank {median} (median; {min(needed)} to {max(needed)})"]


def _columns(sizes: dict[str, float]) -> list[tuple[str, list[float]]]:
    """Return the bars of double and of single blocks; blocks without an update have height 0."""
    groups = []
    for kind in ("double", "single"):
        indices = {int(block.partition(" ")[2]): value for block, value in sizes.items() if block.startswith(kind)}
        if indices:
            groups.append((f"{kind} blocks", [indices.get(index, 0.0) for index in range(max(indices) + 1)]))
    return groups
