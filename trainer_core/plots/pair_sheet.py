"""A picture of some pairs: what a picture starts from, and what is to become of it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..data.cache.latents import place_image
from ..data.dataset import Index, Sample
from ..data.reference_images import References
from ..data.source.decode import decode
from .crop_sheet import of_some, save_sheet

MAX_PAIRS, CELL = 8, 288
WIDE = CELL // 2  # half of a detail


def draw_pair_sheet(index: Index, references: References, path: Path) -> None:
    """Up to 8 pairs, evenly spread over the dataset, one below the other: the start and its target whole, and then the middle of both,
    pixel for pixel, where they are larger than a cell.

    Raises:
        Unreadable: images that can't be decoded, of those that are shown.
    """

    def row(sample: Sample) -> list[Image.Image]:
        start = references.of(sample)
        before = references.change(place_image(decode(references.index.read(start)), start), start)
        after = place_image(decode(index.read(sample)), sample)
        is_large = max(after.size) > CELL
        return [_whole(before), _whole(after), *([_middle(before), _middle(after)] if is_large else [])]

    save_sheet(of_some(index, MAX_PAIRS, row), CELL, path)


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
