"""Validation images side by side, with readable labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

from ..errors import reason_of
from ..storage.atomic import replace_atomic
from .canvas import INK, PANEL, PAPER, SOFT_INK, round_corners, wrap, write

SMALLEST_EDGE, LARGEST_EDGE = 160, 512
LARGEST_GRID = 8192  # pixels along an edge
MARGIN, GAP, RADIUS = 28, 14, 8
TITLE, LABEL = 26, 17  # text sizes
LINE = 1.35  # line height relative to the text size
LABEL_WIDTH = 230
TITLED_WIDTH = 480  # minimum width of a page with a title
CHUNK = "chroma_trainer"
MAX_PNG_BYTES = 1 << 30


def draw_grid(
    rows: Sequence[Sequence[Any]], row_labels: Sequence[str], column_labels: Sequence[str], title: str = ""
) -> Image.Image:
    """Return a grid of images, each with its own aspect ratio.

    The longer edge of an image has 160 to 512 pixels: small images are enlarged by an integer factor, large ones are
    scaled down. Long labels wrap.

    Args:
        rows: Images (H, W, 3), uint8; None leaves a cell empty. Rows may have different lengths.
        row_labels: One per row, such as prompts; [] for none.
        column_labels: One per column, such as "base" and "LoRA 1.0"; [] for none.
        title: Heading; lines after the first are smaller.
    """
    assert rows and any(rows), "nothing to draw"
    assert len(row_labels) in (0, len(rows)), "one label per row"
    columns = max(len(row) for row in rows)
    assert len(column_labels) in (0, columns), "one label per column"
    limit = min(LARGEST_EDGE, LARGEST_GRID // max(columns, len(rows)) - GAP)
    cells = [[None if image is None else fit(image, limit) for image in row] for row in rows]
    widths = [max([cell.width for row in cells for cell in row[c : c + 1] if cell] or [limit]) for c in range(columns)]
    heights = [max([cell.height for cell in row if cell] or [SMALLEST_EDGE]) for row in cells]

    heading = title.splitlines()
    head_lines = [wrap(text, LABEL, width, 3) for text, width in zip(column_labels, widths, strict=False)]
    left = MARGIN + (LABEL_WIDTH + GAP if any(row_labels) else 0)
    width = left + sum(widths) + GAP * (columns - 1) + MARGIN
    width = max(width, TITLED_WIDTH) if heading else width
    titles = [
        (line, *style)
        for text, style in zip(heading, [(TITLE, INK)] + [(LABEL, SOFT_INK)] * len(heading), strict=False)
        for line in wrap(text, style[0], width - 2 * MARGIN, 2)
    ]
    head = MARGIN + sum(round(size * LINE) for _, size, _ in titles) + (GAP if titles else 0)
    top = head + (round(LABEL * LINE) * max(map(len, head_lines), default=0) + GAP // 2 if head_lines else 0)
    page = Image.new("RGB", (width, top + sum(heights) + GAP * (len(rows) - 1) + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)

    y = MARGIN
    for line, size, color in titles:
        write(draw, (MARGIN, y), line, size, color)
        y += round(size * LINE)
    lefts = [left + sum(widths[:c]) + GAP * c for c in range(columns)]
    for lines, x, cell_width in zip(head_lines, lefts, widths, strict=False):
        for i, line in enumerate(lines):  # column labels are aligned at the bottom
            y = top - GAP // 2 - round(LABEL * LINE) * (len(lines) - i)
            write(draw, (x + cell_width / 2, y), line, LABEL, INK, "ma")
    y = top
    for r, (row, row_height) in enumerate(zip(cells, heights, strict=True)):
        if any(row_labels):
            _draw_label(draw, row_labels[r], y, row_height)
        for x, cell_width, cell in zip(lefts, widths, row, strict=False):
            _paste_cell(page, cell, (x, y, cell_width, row_height))
        y += row_height + GAP
    return page


def fit(array: Any, limit: int = LARGEST_EDGE) -> Image.Image:
    """Return the image with 160 to `limit` pixels along its longer edge."""
    image = Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8)).convert("RGB")
    edge = max(image.size)
    if edge < SMALLEST_EDGE:
        factor = min(-(-SMALLEST_EDGE // edge), max(1, limit // edge))
        kind = Image.Resampling.NEAREST if edge < 32 else Image.Resampling.LANCZOS
        return image.resize((image.width * factor, image.height * factor), kind)
    if edge <= limit:
        return image
    size = (max(1, round(image.width * limit / edge)), max(1, round(image.height * limit / edge)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _draw_label(draw: ImageDraw.ImageDraw, text: str, top: int, height: int) -> None:
    """Draw a row's label to the left of its images, vertically centered."""
    line_height = round(LABEL * LINE)
    lines = wrap(text, LABEL, LABEL_WIDTH - GAP, max(1, height // line_height))
    y = top + (height - line_height * len(lines)) / 2 + (line_height - LABEL) / 2
    for i, line in enumerate(lines):
        write(draw, (MARGIN, y + i * line_height), line, LABEL, INK)


def _paste_cell(page: Image.Image, cell: Image.Image | None, box: tuple[int, int, int, int]) -> None:
    """Paste the image into the center of its cell, with round corners. An empty cell is a pale panel."""
    x, y, width, height = box
    cell = cell or Image.new("RGB", (width, height), PANEL)
    at = (x + (width - cell.width) // 2, y + (height - cell.height) // 2)
    page.paste(cell, at, round_corners(cell.size, RADIUS))


def save_png(
    image: Image.Image,
    path: Path,
    request: Mapping[str, Any] | None = None,
    workflow: Mapping[str, Any] | None = None,
    prompt: Mapping[str, Any] | None = None,
) -> None:
    """Write a PNG atomically, with its metadata as JSON in tEXt chunks. Values that are None or empty get no chunk.

    Args:
        image: The image.
        path: The file.
        request: Stored in the chunk `chroma_trainer`.
        workflow: The graph in the editor's format, stored in the chunk `workflow`, which ComfyUI can open.
        prompt: The graph that was executed (API format), stored in the chunk `prompt`, which ComfyUI can open too.
    Raises:
        OSError: The file can't be written; the old one is unchanged.
    """
    chunks = PngImagePlugin.PngInfo()
    for name, value in ((CHUNK, request), ("workflow", workflow), ("prompt", prompt)):
        if value:
            chunks.add_text(name, json.dumps(value, allow_nan=False))  # ASCII, as tEXt requires
    replace_atomic(Path(path), lambda temporary: image.save(temporary, "PNG", pnginfo=chunks))


def find_png_fault(path: Path) -> str:
    """Return what is wrong with a PNG file that save_png wrote, from its structure and checksums; "" if nothing is."""
    try:
        if path.stat().st_size > MAX_PNG_BYTES or not path.is_file():
            return "it is not one of this run's files"
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
    except Exception as error:  # Pillow raises errors of many kinds
        return reason_of(error)
    return ""
