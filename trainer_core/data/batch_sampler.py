"""Choose the samples of micro-batch k as a pure function of the seed, so that resuming needs no saved state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..seeds import generator


class BatchPlan:
    """Batches in which all images share one bucket. Every epoch contains each sample exactly `repeats` times.

    The last batch of a bucket may be smaller than the others: no sample is dropped, and none is repeated to fill it.

    Args:
        buckets: (width, height) of each sample, or an array (samples, 2).
        repeats: Repeats of each sample, >= 1.
        batch_size: Samples in a full batch.
        seed: Seed of the shuffles.
    """

    def __init__(
        self,
        buckets: Sequence[tuple[int, int]] | np.ndarray,
        repeats: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int,
    ):
        assert len(buckets) == len(repeats) and len(buckets), "nothing to train on"
        self.batch_size, self.seed, self.num_images = batch_size, seed, len(buckets)
        sizes = np.asarray(buckets, dtype=np.int64).reshape(-1, 2)
        kinds, number = np.unique(sizes, axis=0, return_inverse=True)  # sorted in the order of Python tuples
        number, counts = number.reshape(-1), np.asarray(repeats, dtype=np.int64)
        self._members = [_repeat_members(np.flatnonzero(number == kind), counts) for kind in range(len(kinds))]
        self.num_samples = int(counts.sum())
        self._ends = np.cumsum(
            [-(-len(members) // batch_size) for members in self._members]
        )  # cumulative number of batches per bucket
        self.batches_per_epoch = int(self._ends[-1])
        self._epoch: tuple[int, Any] = (-1, None)

    def batch(self, micro_step: int) -> tuple[int, ...]:
        """Return the sample indices of a micro-batch, which is counted from the start of the run."""
        epoch, position = divmod(micro_step, self.batches_per_epoch)
        cached_epoch, shuffled = self._epoch
        if cached_epoch != epoch:
            shuffled = self._shuffle(epoch)
            self._epoch = epoch, shuffled  # one assignment, so that another thread never sees half of it
        orders, batches = shuffled
        batch = int(batches[position])
        kind = int(np.searchsorted(self._ends, batch, side="right"))
        first = (batch - (int(self._ends[kind - 1]) if kind else 0)) * self.batch_size
        return tuple(self._members[kind][orders[kind][first : first + self.batch_size]].tolist())

    def _shuffle(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Shuffle each bucket's samples, which are then cut into batches in that order, and shuffle the epoch's
        batches.
        """
        draw = generator(self.seed, "order", epoch)
        orders = [_to_uint32(torch.randperm(len(members), generator=draw).numpy()) for members in self._members]
        return orders, _to_uint32(torch.randperm(self.batches_per_epoch, generator=draw).numpy())

    def explain(self, num_steps: int, accumulation: int) -> str:
        """Return how many epochs the steps amount to, as a line of text."""
        repeated = f" x repeats = {self.num_samples} samples" if self.num_samples != self.num_images else ""
        accumulated = f" x accumulation {accumulation}" if accumulation > 1 else ""
        epochs = num_steps * accumulation / self.batches_per_epoch
        return (
            f"{self.num_images} images{repeated}; batch {self.batch_size}{accumulated} -> "
            f"{self.batches_per_epoch} batches per epoch; {num_steps} steps = {epochs:.1f} epochs"
        )


def _repeat_members(members: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    return _to_uint32(np.repeat(members, repeats[members]))


def _to_uint32(numbers: np.ndarray) -> np.ndarray:
    """Return the array as uint32, which halves its memory, if every value fits."""
    return numbers.astype(np.uint32) if len(numbers) < 2**32 and numbers.max(initial=0) < 2**32 else numbers
