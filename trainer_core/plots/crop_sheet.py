"""Draw an overview of the training images: each one whole, with a frame around the part that is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageChops, ImageDraw

from ..data.dataset import Index, Sample, Unreadable
from ..data.source.decode import BrokenImage, decode, decode_mask
from ..storage.atomic import replace_atomic

MAX_IMAGES, CELL, GAP, COLUMNS = 64, 192, 10, 8
PAPER, SHADE, FRAME = (250, 250, 252), (20, 22, 30, 150), (16, 150, 140)

Result = TypeVar("Result")


def draw_crop_sheet(index: Index, path: Path) -> None:
    """Draw up to 64 images, evenly distributed over the dataset. What a crop or a mask leaves out is darkened.

    Raises:
        Unreadable: Those of these images that can't be decoded.
    """
    cells = map_samples(index, MAX_IMAGES, lambda sample: _draw_cell(index, sample))
    save_sheet([cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)], CELL, path)


def map_samples(index: Index, most: int, make: Callable[[Sample], Result]) -> list[Result]:
    """Return the results of `make` for up to `most` samples, evenly distributed over the dataset.

    Raises:
        Unreadable: Those of these images that can't be decoded.
    """
    results: list[Result] = []
    faults: dict[str, str] = {}
    for sample in index.samples[:: -(-len(index.samples) // most)]:
        try:
            results.append(make(sample))
        except (OSError, BrokenImage) as error:
            faults[sample.key] = f"can't be decoded: {error}"
    if faults:
        raise Unreadable(faults)
    return results


def save_sheet(rows: Sequence[Sequence[Image.Image]], edge: int, path: Path) -> None:
    """Save images in rows, each centered in a square cell with this edge."""
    step = edge + GAP
    page = Image.new("RGB", (max(map(len, rows)) * step + GAP, len(rows) * step + GAP), PAPER)
    for down, row in enumerate(rows):
        for across, cell in enumerate(row):
            page.paste(
                cell, (GAP + across * step + (edge - cell.width) // 2, GAP + down * step + (edge - cell.height) // 2)
            )
    replace_atomic(path, lambda temporary: page.save(temporary, "PNG", compress_level=1))  # takes a quarter of the time


def _draw_cell(index: Index, sample: Sample) -> Image.Image:
    image = decode(index.read(sample), at_least=CELL)
    scale = min(CELL / image.width, CELL / image.height)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    placement = sample.placement
    across, down = small.width / placement.resize[0], small.height / placement.resize[1]
    left, top = placement.crop[0] * across, placement.crop[1] * down
    right, bottom = left + placement.bucket[0] * across, top + placement.bucket[1] * down
    box = (round(left), round(top), max(round(left), round(right) - 1), max(round(top), round(bottom) - 1))
    shade = Image.new("RGBA", small.size, SHADE)
    ImageDraw.Draw(shade).rectangle(box, fill=(0, 0, 0, 0), outline=(*FRAME, 255), width=2)
    mask = index.masks.of(sample) if index.masks else None
    if mask:
        shade.putalpha(ImageChops.lighter(shade.getchannel("A"), _mask_to_alpha(index, mask, small.size)))
    return Image.alpha_composite(small.convert("RGBA"), shade).convert("RGB")


def _mask_to_alpha(index: Index, mask: Sample, size: tuple[int, int]) -> Image.Image:
    """Return the alpha of the shade, which is highest where the mask is black.

    It is 0 for a broken mask, which is reported when its weights are computed.
    """
    assert index.masks
    try:
        grey = decode_mask(index.masks.read(mask)).resize(size)
    except (OSError, BrokenImage):
        return Image.new("L", size, 0)
    return grey.point([SHADE[3] * (255 - value) // 255 for value in range(256)])
