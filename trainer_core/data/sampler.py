"""Which samples make up micro-batch number k: a pure function of the seed, so that a resume needs no state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from ..seeds import generator


class BatchPlan:
    """Batches of one bucket each. In every epoch each sample is seen `repeats` times, no more, no less.

    The last batch of a bucket may be smaller than the rest: nothing is dropped and nothing is seen twice to fill it up.

    Args:
        buckets: of each sample.
        repeats: of each sample, >= 1.
    """

    def __init__(self, buckets: Sequence[tuple[int, int]], repeats: Sequence[int], batch_size: int, seed: int):
        assert len(buckets) == len(repeats) and buckets, "nothing to train on"
        self.batch_size, self.seed, self.num_images = batch_size, seed, len(buckets)
        self._members: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, bucket in enumerate(buckets):
            self._members[bucket].extend([i] * repeats[i])
        self.num_samples = sum(map(len, self._members.values()))
        self.batches_per_epoch = sum(-(-len(members) // batch_size) for members in self._members.values())
        self._epoch, self._batches = -1, []

    def batch(self, micro_step: int) -> tuple[int, ...]:
        """Numbers of the samples of a micro-batch, counted from the run's beginning."""
        epoch, place = divmod(micro_step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[place]

    def _shuffled(self, epoch: int) -> list[tuple[int, ...]]:
        """The epoch's batches: each bucket's samples shuffled and cut, then the batches shuffled."""
        draw = generator(self.seed, "order", epoch)
        batches = []
        for bucket in sorted(self._members):
            members = self._members[bucket]
            order = [members[i] for i in torch.randperm(len(members), generator=draw).tolist()]
            batches.extend(tuple(order[i : i + self.batch_size]) for i in range(0, len(order), self.batch_size))
        return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]

    def explain(self, num_steps: int, accumulation: int) -> str:
        """The arithmetic, in words."""
        repeated = f" x repeats = {self.num_samples} samples" if self.num_samples != self.num_images else ""
        gathered = f" x accumulation {accumulation}" if accumulation > 1 else ""
        epochs = num_steps * accumulation / self.batches_per_epoch
        return (
            f"{self.num_images} images{repeated}; batch {self.batch_size}{gathered} -> {self.batches_per_epoch} batches an epoch; "
            f"{num_steps} steps = {epochs:.1f} epochs"
        )
