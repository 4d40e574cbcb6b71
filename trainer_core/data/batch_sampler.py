"""Which samples make up micro-batch number k: a pure function of the seed, so that a resume needs no state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..seeds import generator


class BatchPlan:
    """Batches of one bucket each. In every epoch each sample is seen `repeats` times, no more, no less.

    The last batch of a bucket may be smaller than the rest: nothing is dropped and nothing is seen twice to fill it up.

    Args:
        buckets: (width, height) of each sample; an array (samples, 2) for many.
        repeats: of each sample, >= 1.
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
        kinds, number = np.unique(sizes, axis=0, return_inverse=True)  # sorted, as Python sorts pairs
        number, counts = number.reshape(-1), np.asarray(repeats, dtype=np.int64)
        self._members = [_repeat_members(np.flatnonzero(number == kind), counts) for kind in range(len(kinds))]
        self.num_samples = int(counts.sum())
        self._ends = np.cumsum([-(-len(members) // batch_size) for members in self._members])  # batches, by bucket
        self.batches_per_epoch = int(self._ends[-1])
        self._epoch: tuple[int, Any] = (-1, None)

    def batch(self, micro_step: int) -> tuple[int, ...]:
        """Numbers of the samples of a micro-batch, counted from the run's beginning."""
        epoch, place = divmod(micro_step, self.batches_per_epoch)
        number, drawn = self._epoch
        if number != epoch:
            drawn = self._shuffle(epoch)
            self._epoch = epoch, drawn  # one assignment: another thread sees the whole of it
        orders, batches = drawn
        batch = int(batches[place])
        kind = int(np.searchsorted(self._ends, batch, side="right"))
        first = (batch - (int(self._ends[kind - 1]) if kind else 0)) * self.batch_size
        return tuple(self._members[kind][orders[kind][first : first + self.batch_size]].tolist())

    def _shuffle(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Each bucket's samples shuffled (and cut into batches in that order), then the epoch's batches shuffled."""
        draw = generator(self.seed, "order", epoch)
        orders = [_short(torch.randperm(len(members), generator=draw).numpy()) for members in self._members]
        return orders, _short(torch.randperm(self.batches_per_epoch, generator=draw).numpy())

    def explain(self, num_steps: int, accumulation: int) -> str:
        """The arithmetic, in words."""
        repeated = f" x repeats = {self.num_samples} samples" if self.num_samples != self.num_images else ""
        gathered = f" x accumulation {accumulation}" if accumulation > 1 else ""
        epochs = num_steps * accumulation / self.batches_per_epoch
        return (
            f"{self.num_images} images{repeated}; batch {self.batch_size}{gathered} -> {self.batches_per_epoch} batches an epoch; "
            f"{num_steps} steps = {epochs:.1f} epochs"
        )


def _repeat_members(members: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    return _short(np.repeat(members, repeats[members]))


def _short(numbers: np.ndarray) -> np.ndarray:
    """Half the memory, where the numbers are not too large for it."""
    return numbers.astype(np.uint32) if len(numbers) < 2**32 and numbers.max(initial=0) < 2**32 else numbers
