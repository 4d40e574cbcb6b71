"""A picture of some pairs: what a picture starts from, and what is to become of it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..files import replace_atomic
from .images import BrokenImage, decode
from .index import Index, Unreadable
from .latents import placed
from .references import References
from .sheet import GAP, PAPER

MAX_PAIRS, CELL = 8, 288
WIDE = CELL // 2  # half of a detail


def draw_pair_sheet(index: Index, references: References, path: Path) -> None:
    """Up to 8 pairs, evenly spread over the dataset, one below the other: the start and its target whole, and then the middle of both,
    pixel for pixel, where they are larger than a cell.

    Raises:
        Unreadable: images that can't be decoded, of those that are shown.
    """
    rows: list[list[Image.Image]] = []
    faults: dict[str, str] = {}
    for sample in index.samples[:: -(-len(index.samples) // MAX_PAIRS)]:
        start = references.of(sample)
        try:
            before = references.change(placed(decode(references.index.read(start)), start), start)
            after = placed(decode(index.read(sample)), sample)
        except (OSError, BrokenImage) as error:
            faults[sample.key] = f"can't be decoded: {error}"
            continue
        is_large = max(after.size) > CELL
        rows.append([_whole(before), _whole(after), *([_middle(before), _middle(after)] if is_large else [])])
    if faults:
        raise Unreadable(faults)
    page = Image.new("RGB", (max(map(len, rows)) * (CELL + GAP) + GAP, len(rows) * (CELL + GAP) + GAP), PAPER)
    for down, row in enumerate(rows):
        for across, cell in enumerate(row):
            left, top = GAP + across * (CELL + GAP), GAP + down * (CELL + GAP)
            page.paste(cell, (left + (CELL - cell.width) // 2, top + (CELL - cell.height) // 2))
    replace_atomic(path, lambda temporary: page.save(temporary, "PNG", compress_level=1))


def _whole(image: Image.Image) -> Image.Image:
    """Small ones are enlarged by whole pixels."""
    if max(image.size) <= CELL:
        times = CELL // max(image.size)
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    scale = CELL / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _middle(image: Image.Image) -> Image.Image:
    x, y = image.width // 2, image.height // 2
    return image.crop((max(0, x - WIDE), max(0, y - WIDE), min(image.width, x + WIDE), min(image.height, y + WIDE)))
