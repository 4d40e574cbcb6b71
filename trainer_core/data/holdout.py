"""Choose the images that are held out from training for the validation loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..storage.atomic import sha256_text
from ..storage.digest_table import argsort_rows, digests
from .sample_table import Chosen, Sample, columns


def split(samples: Sequence[Sample], share: float) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Split samples into (trained, held out), each in the original order.

    Samples are chosen by the hash of their keys, so that an image stays on its side when others are added or removed.
    Samples of one image, such as those at several resolutions, are on the same side: the loss of an image that is
    trained elsewhere says nothing about new ones. With a share above 0 at least one is held out, and at least one is
    trained on.

    Args:
        samples: All samples.
        share: Share that is held out, in [0, 0.5].
    """
    if not num_wanted(len(samples), share):
        return samples, ()
    is_held = _held_out(samples, share)
    return _choose(samples, ~is_held), _choose(samples, is_held)


def num_held(samples: Sequence[Sample], share: float) -> int:
    """Return how many samples are held out."""
    return int(_held_out(samples, share).sum()) if num_wanted(len(samples), share) else 0


def keeps_copies_together(samples: Sequence[Sample], share: float) -> bool:
    """Return whether other samples are held out than if those of one image were chosen one by one."""
    count = num_wanted(len(samples), share)
    if not count or _images(samples)[1].max() == 1:
        return False
    return not np.array_equal(np.flatnonzero(_held_out(samples, share)), np.sort(_order(samples)[:count]))


def num_wanted(num_samples: int, share: float) -> int:
    """Return how many samples are held out where each is of another image."""
    return min(num_samples - 1, max(1, round(share * num_samples))) if share else 0


def _order(samples: Sequence[Sample]) -> np.ndarray:
    return argsort_rows(digests(sha256_text("holdout", sample.key) for sample in samples))


def _images(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each sample's image, and how many samples each image has. Equal bytes are one image."""
    whole = np.ascontiguousarray(columns(samples)["sha256"]).view("V32").reshape(-1)
    _, image_of, sizes = np.unique(whole, return_inverse=True, return_counts=True)
    return image_of.reshape(-1), sizes


def _held_out(samples: Sequence[Sample], share: float) -> np.ndarray:
    """Return a mask of the samples that are held out.

    Images are taken in the order of their samples until the next one is too many, but at least one.
    """
    count, order = num_wanted(len(samples), share), _order(samples)
    image_of, sizes = _images(samples)
    is_taken, taken = np.zeros(len(sizes), dtype=bool), 0
    for image in image_of[order[:count]].tolist():
        size = int(sizes[image])
        if not is_taken[image] and (taken + size <= count or (not taken and size < len(samples))):
            is_taken[image] = True
            taken += size
        elif not is_taken[image]:
            break
    if taken:
        return is_taken[image_of]
    is_held = np.zeros(len(samples), dtype=bool)  # all samples are of one image
    is_held[order[:count]] = True
    return is_held


def _choose(samples: Sequence[Sample], which: np.ndarray) -> Chosen:
    return Chosen(samples, np.flatnonzero(which).astype(np.uint32))
