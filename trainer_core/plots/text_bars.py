"""A bar chart of characters for terminals and text widgets."""

from __future__ import annotations

from collections.abc import Sequence

BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII_BLOCKS = " ..::-=+#"
GAP = 3


def text_bars(groups: Sequence[tuple[str, Sequence[float]]], height: int, ascii_only: bool = False) -> list[str]:
    """Return lines of a chart with one column per value. All groups share one scale.

    Args:
        groups: Title and non-negative values of each group, side by side.
        height: In lines, without the axis and the titles.
        ascii_only: For consoles that can't show block characters.
    """
    blocks, top = ASCII_BLOCKS if ascii_only else BLOCKS, max(max(values) for _, values in groups)
    widths = [max(len(title), len(values)) for title, values in groups]
    lines = []
    for row in range(height - 1, -1, -1):
        cells = ["".join(_cell(value, top, height, row, blocks) for value in values) for _, values in groups]
        lines.append((" " * GAP).join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    rule = "-" if ascii_only else "─"
    lines.append(
        (" " * GAP).join((rule * len(values)).ljust(width) for (_, values), width in zip(groups, widths, strict=True))
    )
    lines.append(
        (" " * GAP).join(title.ljust(width) for (title, _), width in zip(groups, widths, strict=True)).rstrip()
    )
    return lines


def _cell(value: float, top: float, height: int, row: int, blocks: str) -> str:
    level = max(int(value > 0), round(value / top * height * 8)) if top else 0
    return blocks[min(8, max(0, level - 8 * row))]
