"""Draw an overview of training pairs: reference images and their targets."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..data.cache.latents import place_image
from ..data.dataset import Index, Sample
from ..data.reference_images import References
from ..data.source.decode import decode
from .crop_sheet import map_samples, save_sheet

MAX_PAIRS, CELL = 8, 288
WIDE = CELL // 2  # half the edge of a detail


def draw_pair_sheet(index: Index, references: References, path: Path) -> None:
    """Draw up to 8 pairs, one per row, evenly distributed over the dataset.

    A row shows the reference and its target as a whole. If they are larger than a cell, it also shows the center of
    both at
    full resolution.

    Raises:
        Unreadable: Those of these images that can't be decoded.
    """

    def row(sample: Sample) -> list[Image.Image]:
        start = references.of(sample)
        before = references.change(place_image(decode(references.index.read(start)), start), start)
        after = place_image(decode(index.read(sample)), sample)
        is_large = max(after.size) > CELL
        return [_fit_cell(before), _fit_cell(after), *([_crop_center(before), _crop_center(after)] if is_large else [])]

    save_sheet(map_samples(index, MAX_PAIRS, row), CELL, path)


def _fit_cell(image: Image.Image) -> Image.Image:
    """Fit the image into a cell. Small images are enlarged by an integer factor."""
    if max(image.size) <= CELL:
        times = CELL // max(image.size)
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    scale = CELL / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _crop_center(image: Image.Image) -> Image.Image:
    x, y = image.width // 2, image.height // 2
    return image.crop((max(0, x - WIDE), max(0, y - WIDE), min(image.width, x + WIDE), min(image.height, y + WIDE)))
