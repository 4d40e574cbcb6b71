"""Find images that are copies of each other: saved again, resized, slightly cropped, brightened or mirrored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..thresholds import SAME_CORRELATION, SAME_HASH_BITS
from .image_measures import Measures

MOST_PRODUCTS = 1 << 24  # pairs of hashes that are compared at once: 64 MiB


@dataclass(frozen=True)
class Copy:
    """An image that is a copy of an earlier one.

    Attributes:
        index: Index of the copy.
        of: Index of the first image that it is a copy of.
        is_mirrored: Whether it is its mirror image.
        correlation: Of both at 16 x 16 pixels.
    """

    index: int
    of: int
    is_mirrored: bool
    correlation: float


def find_copies(measures: Sequence[Measures], check_cancelled: Callable[[], None] = lambda: None) -> list[Copy]:
    """Return every image that is a copy of an earlier one, with the first of its copies, in order of the images.

    Args:
        measures: Those of all images.
        check_cancelled: Raises if the user canceled; called for every block of images.
    """
    if len(measures) < 2:
        return []
    first = list(range(len(measures)))
    copies: list[Copy] = []
    for index, candidates in _similar(measures, check_cancelled):
        match = next(filter(None, (_compare(measures, index, of, mirrored) for of, mirrored in candidates)), None)
        if match:
            first[index] = first[match.of]
            copies.append(replace(match, of=first[index]))
    return copies


def _similar(
    measures: Sequence[Measures], check_cancelled: Callable[[], None]
) -> Iterator[tuple[int, Iterator[tuple[int, bool]]]]:
    """Yield the index of each image, and of earlier images with nearly the same hash: as they are, then mirrored."""
    hashes = np.stack([item.hash for item in measures]).astype(np.float32)
    mirrored = np.stack([item.mirrored_hash for item in measures]).astype(np.float32)
    least = hashes.shape[1] - 2 * SAME_HASH_BITS  # product of two vectors of signs
    rows = max(1, MOST_PRODUCTS // len(measures))
    for start in range(0, len(measures), rows):
        check_cancelled()
        tables = [(hashes[start : start + rows] @ table.T >= least) for table in (hashes, mirrored)]
        for row in range(len(tables[0])):
            yield start + row, _candidates(start + row, tables[0][row], tables[1][row])


def _candidates(index: int, same: np.ndarray, mirrored: np.ndarray) -> Iterator[tuple[int, bool]]:
    for is_mirrored, row in ((False, same), (True, mirrored)):
        for of in np.flatnonzero(row[:index]).tolist():
            yield of, is_mirrored


def _compare(measures: Sequence[Measures], index: int, of: int, is_mirrored: bool) -> Copy | None:
    thumb = measures[index].thumb
    correlation = _correlation(thumb[:, ::-1] if is_mirrored else thumb, measures[of].thumb)
    return Copy(index, of, is_mirrored, correlation) if correlation >= SAME_CORRELATION else None


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    a, b = (values.astype(np.float64).reshape(-1) for values in (one, other))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    if scale == 0.0:  # one of them has a single color
        return float(np.array_equal(one, other))
    return float(a @ b) / scale
