"""Choose the images that are held out from training for the validation loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..storage.atomic import sha256_text
from ..storage.digest_table import argsort_rows, digests
from .sample_table import Chosen, Sample


def split(samples: Sequence[Sample], share: float) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Split samples into (trained, held out), each in the original order.

    Samples are chosen by the hash of their keys, so that an image stays on its side when others are added or removed.
    With a share above 0 at least one is held out, and at least one is trained on.

    Args:
        samples: All samples.
        share: Share that is held out, in [0, 0.5].
    """
    if not num_held(len(samples), share):
        return samples, ()
    count = num_held(len(samples), share)
    is_held = np.zeros(len(samples), dtype=bool)
    is_held[argsort_rows(digests(sha256_text("holdout", sample.key) for sample in samples))[:count]] = True
    return _choose(samples, ~is_held), _choose(samples, is_held)


def num_held(num_samples: int, share: float) -> int:
    """Return how many samples are held out."""
    return min(num_samples - 1, max(1, round(share * num_samples))) if share else 0


def _choose(samples: Sequence[Sample], which: np.ndarray) -> Chosen:
    return Chosen(samples, np.flatnonzero(which).astype(np.uint32))
