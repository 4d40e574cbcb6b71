"""Find a mark that many images have in the same place: a watermark, a logo, a date, a signature.

A watermark is what the gradients of many images agree on (Dekel et al. 2017, "On the Effectiveness of Visible
Watermarks", CVPR). Each image is scaled to the same shorter edge, so that marks which are placed from a corner are in
the same place of images of any aspect ratio, and its gradients around the corners and in the middle are compared with
those of the other images, tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..thresholds import MARK_DIRECTIONS, MARK_IMAGES, MARK_SHARE, SAME_GRADIENT

MOST_IMAGES = 256  # that are compared, evenly distributed over the dataset: a mark in a tenth of all is in 25 of them
EDGE, WINDOW, TILE, STEP = 192, 96, 32, 16
PLACES = ("upper left", "upper right", "lower left", "lower right", "middle")
MOST_GRADIENT = 20.0  # levels: a stronger edge counts as much, so that marks which are faint count beside it
LEAST_GRADIENT = 1.0  # levels: root mean square of a tile with something in it
SCALE = 6.0  # steps in a byte for each level


@dataclass(frozen=True)
class RepeatedMark:
    """A mark that images have in the same place.

    Attributes:
        place: One of PLACES.
        indices: Of the images with the mark.
        corner: (x, y) of the tile in its window, in pixels of an image whose shorter edge is EDGE.
        num_compared: Number of images that were compared.
    """

    place: str
    indices: tuple[int, ...]
    corner: tuple[int, int]
    num_compared: int

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return (left, top, right, bottom) of the tile in an image of this size."""
        scale = min(width, height) / EDGE
        left, top = _window_corner(PLACES.index(self.place), width / scale, height / scale)
        x, y = left + self.corner[0], top + self.corner[1]
        return x * scale, y * scale, (x + TILE) * scale, (y + TILE) * scale


def pick_for_marks(count: int) -> range:
    """Return the indices of the images that are compared."""
    return range(0, count, max(1, -(-count // MOST_IMAGES)))


def gradients_of(image: Image.Image) -> np.ndarray:
    """Return the gradients of an image in each of the PLACES, (places, 2, WINDOW, WINDOW), as bytes."""
    scale = EDGE / min(image.size)
    size = max(EDGE, round(image.width * scale)), max(EDGE, round(image.height * scale))
    gray = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    both = np.zeros((2, *gray.shape), np.float32)
    both[0, :, 1:-1] = (gray[:, 2:] - gray[:, :-2]) / 2
    both[1, 1:-1] = (gray[2:] - gray[:-2]) / 2
    scaled = np.rint(np.clip(both, -MOST_GRADIENT, MOST_GRADIENT) * SCALE).astype(np.int8)
    corners = [_window_corner(place, *size) for place in range(len(PLACES))]
    return np.stack([scaled[:, int(y) : int(y) + WINDOW, int(x) : int(x) + WINDOW] for x, y in corners])


def _window_corner(place: int, width: float, height: float) -> tuple[float, float]:
    right, bottom = width - WINDOW, height - WINDOW
    return ((0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, bottom // 2))[place]


def find_marks(fields: Sequence[np.ndarray], check_cancelled: Callable[[], None] = lambda: None) -> list[RepeatedMark]:
    """Return the most frequent mark of each place, if at least a tenth of the images have it.

    Args:
        fields: Gradients of the images, see `gradients_of`. Copies must not be among them.
        check_cancelled: Raises if the user canceled; called for every tile.
    """
    least = max(MARK_IMAGES, round(MARK_SHARE * len(fields)))
    if len(fields) < least:
        return []
    best: dict[int, RepeatedMark] = {}
    for place, x, y in _tiles():
        check_cancelled()
        members = _agreeing(np.stack([field[place, :, y : y + TILE, x : x + TILE] for field in fields]), least)
        if members and (place not in best or len(members) > len(best[place].indices)):
            best[place] = RepeatedMark(PLACES[place], members, (x, y), len(fields))
    return [best[place] for place in sorted(best)]


def _tiles() -> Iterator[tuple[int, int, int]]:
    for place in range(len(PLACES)):
        for y in range(0, WINDOW - TILE + 1, STEP):
            for x in range(0, WINDOW - TILE + 1, STEP):
                yield place, x, y


def _agreeing(tiles: np.ndarray, least: int) -> tuple[int, ...]:
    """Return the indices of the tiles that agree with the one that most agree with; () if they are too few, or if
    what they share is a straight edge or an outline.
    """
    rows = tiles.reshape(len(tiles), -1).astype(np.float32)
    norms = np.linalg.norm(rows, axis=1)
    has_content = norms > LEAST_GRADIENT * SCALE * np.sqrt(rows.shape[1])
    if has_content.sum() < least:
        return ()
    rows = np.where(has_content[:, None], rows / np.maximum(norms, 1e-6)[:, None], 0.0)
    agrees = rows @ rows.T > SAME_GRADIENT
    counts = agrees.sum(axis=1)
    members = np.flatnonzero(agrees[int(counts.argmax())])
    if len(members) < least:
        return ()
    shared = rows[members].mean(axis=0).reshape(2, -1)
    smaller, larger = np.linalg.eigvalsh(shared @ shared.T).tolist()
    return tuple(members.tolist()) if smaller >= MARK_DIRECTIONS * larger else ()
