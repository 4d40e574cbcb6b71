"""Draw the findings of a dataset: the images of each, with their numbers."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..data.source.decode import BrokenImage, decode
from ..host import Host
from ..plots.canvas import AMBER, INK, PAPER, ROSE, SOFT_INK, shorten, wrap, write
from .findings import WARNING, Case, DatasetReport, Finding
from .image_list import ImageList

CELL, GAP, COLUMNS, ROWS = 150, 12, 8, 2
MARGIN, LABEL, LINE, TITLE_SIZE, TEXT_SIZE, SMALL = 20, 34, 22, 22, 15, 11
WIDTH = 2 * MARGIN + COLUMNS * CELL + (COLUMNS - 1) * GAP
HEADING_LINES = 3
GROUP_COLORS = ((58, 96, 222), (18, 150, 130), (232, 146, 40), (212, 70, 110), (130, 80, 200), (96, 104, 120))


def draw_findings(report: DatasetReport, images: ImageList, host: Host) -> Image.Image:
    """Return the sheet. Of each finding, up to 16 images are shown."""
    shown = [finding for finding in report.findings if finding.is_drawn]
    heights = [_height(finding) for finding in shown]
    page = Image.new("RGB", (WIDTH, 2 * MARGIN + LINE * 3 + sum(heights)), PAPER)
    draw = ImageDraw.Draw(page)
    write(draw, (MARGIN, MARGIN), ", ".join(report.names), TITLE_SIZE)
    text = f"{report.num_usable} of {report.num_images} images can be trained"
    text += "" if report.findings else "; nothing is wrong with them"
    write(draw, (MARGIN, MARGIN + 30), text, TEXT_SIZE, SOFT_INK)
    top = MARGIN + LINE * 3
    for finding, height in zip(shown, heights, strict=True):
        host.check_cancelled()
        _draw_finding(page, draw, finding, images, top)
        top += height
    return page


def _headings(finding: Finding) -> Sequence[str]:
    return wrap(finding.text, TEXT_SIZE, WIDTH - 2 * MARGIN - 16, HEADING_LINES)


def _height(finding: Finding) -> int:
    rows = min(ROWS, -(-len(finding.cases) // COLUMNS))
    return len(_headings(finding)) * LINE + rows * (CELL + LABEL + GAP) + LINE


def _draw_finding(page: Image.Image, draw: ImageDraw.ImageDraw, finding: Finding, images: ImageList, top: int) -> None:
    color = ROSE if finding.severity == WARNING else AMBER
    draw.rectangle((MARGIN, top, MARGIN + 5, top + len(_headings(finding)) * LINE - 6), fill=color)
    for line in _headings(finding):
        write(draw, (MARGIN + 14, top), line, TEXT_SIZE, INK)
        top += LINE
    for index, case in enumerate(finding.cases[: COLUMNS * ROWS]):
        left, down = MARGIN + index % COLUMNS * (CELL + GAP), top + index // COLUMNS * (CELL + LABEL + GAP)
        cell = _draw_cell(images, case)
        page.paste(cell, (left + (CELL - cell.width) // 2, down + (CELL - cell.height) // 2))
        if case.group:
            color = GROUP_COLORS[(case.group - 1) % len(GROUP_COLORS)]
            draw.rectangle((left - 3, down - 3, left + CELL + 2, down + CELL + 2), outline=color, width=3)
        for number, text in enumerate((case.label, case.value)):
            at = left, down + CELL + 4 + number * 14
            write(draw, at, shorten(text, SMALL, CELL), SMALL, SOFT_INK if number else INK)


def _draw_cell(images: ImageList, case: Case) -> Image.Image:
    """Return the image small, with a frame around what is meant; an empty cell if it can't be read any more."""
    try:
        image = decode(images.read(images.images[case.number - 1]), at_least=CELL)
    except (OSError, BrokenImage):
        return Image.new("RGB", (CELL, CELL), SOFT_INK)
    scale = min(CELL / image.width, CELL / image.height)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    if case.box:
        edges = [share * edge for share, edge in zip(case.box, (*small.size, *small.size), strict=True)]
        ImageDraw.Draw(small).rectangle(edges, outline=ROSE, width=2)
    return small
