"""Choose the images that are held out from training for the validation loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..storage.atomic import sha256_text
from ..storage.digest_table import argsort_rows, digests
from .sample_table import Chosen, Sample, columns


def split(samples: Sequence[Sample], share: float) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Split samples into (trained, held out), each in the original order.

    Images are chosen by the hash of their keys, so that an image stays on its side when others are added or removed.
    All samples of an image (at several resolutions, or copies of its file) are on the same side: the loss of an image
    that is trained elsewhere says nothing about new ones. With a share above 0 at least one image is held out, and at
    least one is trained on.

    Args:
        samples: All samples.
        share: Share of the images that is held out, in [0, 0.5].
    """
    if not share or len(samples) < 2:
        return samples, ()
    is_held = _held_out(samples, share)
    return _choose(samples, ~is_held), _choose(samples, is_held)


def num_held(samples: Sequence[Sample], share: float) -> int:
    """Return how many samples are held out."""
    return int(_held_out(samples, share).sum()) if share and len(samples) > 1 else 0


def keeps_copies_together(samples: Sequence[Sample], share: float) -> bool:
    """Return whether other samples are held out than if those of one image were chosen one by one."""
    if not share or len(samples) < 2 or len(_images(samples)[0]) == len(samples):
        return False
    one_by_one = np.zeros(len(samples), dtype=bool)
    one_by_one[_ranked(samples)[: _count(len(samples), share)]] = True
    return not np.array_equal(one_by_one, _held_out(samples, share))


def _held_out(samples: Sequence[Sample], share: float) -> np.ndarray:
    """Return a mask of the samples that are held out, of 2 or more."""
    firsts, image_of = _images(samples)
    images = samples if len(firsts) == len(samples) else Chosen(samples, firsts)
    return np.isin(image_of, _ranked(images)[: _count(len(images), share)])


def _images(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the first sample of each image, and the number of each sample's image.

    Files with the same content are one image. Where all are, each sample counts as one, so that there is a choice.
    """
    contents = np.ascontiguousarray(columns(samples)["sha256"]).view("V32").reshape(-1)
    _, firsts, image_of = np.unique(contents, return_index=True, return_inverse=True)
    if 1 < len(firsts) < len(samples):
        return firsts.astype(np.uint32), image_of.reshape(-1)
    return np.arange(len(samples), dtype=np.uint32), np.arange(len(samples))


def _ranked(samples: Sequence[Sample]) -> np.ndarray:
    return argsort_rows(digests(sha256_text("holdout", sample.key) for sample in samples))


def _count(num_images: int, share: float) -> int:
    return min(num_images - 1, max(1, round(share * num_images)))


def _choose(samples: Sequence[Sample], which: np.ndarray) -> Chosen:
    return Chosen(samples, np.flatnonzero(which).astype(np.uint32))
