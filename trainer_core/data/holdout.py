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
    Samples of one image (at several resolutions, or copies of a file) are on the same side: else the loss of held-out
    samples would be that of images that are trained on. The first one's key decides.
    With a share above 0 at least one sample is held out, and at least one is trained on. Where an image has several,
    up to one less than these are held out beyond the share.

    Args:
        samples: All samples.
        share: Share of the samples that is held out, in [0, 0.5].
    """
    if not num_held(len(samples), share):
        return samples, ()
    count = num_held(len(samples), share)
    firsts, image_of = _images(samples)
    images = samples if len(firsts) == len(samples) else Chosen(samples, firsts)
    ranked = argsort_rows(digests(sha256_text("holdout", image.key) for image in images))
    sizes = np.bincount(image_of, minlength=len(firsts))[ranked].cumsum()
    num_images = min(int(np.searchsorted(sizes, count)) + 1, len(firsts) - 1)
    is_held = np.isin(image_of, ranked[:num_images])
    return _choose(samples, ~is_held), _choose(samples, is_held)


def _images(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the first sample of each image, and the number of each sample's image."""
    contents = np.ascontiguousarray(columns(samples)["sha256"]).view("V32").reshape(-1)
    _, firsts, image_of = np.unique(contents, return_index=True, return_inverse=True)
    if 1 < len(firsts) < len(samples):
        return firsts, image_of.reshape(-1)
    return np.arange(len(samples)), np.arange(len(samples))  # also copies of a single image, which have to be split


def num_held(num_samples: int, share: float) -> int:
    """Return how many samples are held out."""
    return min(num_samples - 1, max(1, round(share * num_samples))) if share else 0


def _choose(samples: Sequence[Sample], which: np.ndarray) -> Chosen:
    return Chosen(samples, np.flatnonzero(which).astype(np.uint32))
