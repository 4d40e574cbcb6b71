"""Forward passes of a micro-batch beside the one that learns, on average: of rollouts, and of pictures that keep the model as it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config.training import TrainingConfig


@dataclass(frozen=True)
class PriorShares:
    """Of all micro-batches, those with any picture that keeps the model as it is, and those of such pictures alone."""

    some: float = 0.0
    only: float = 0.0


def prior_shares(buckets: np.ndarray, is_prior: np.ndarray, repeats: np.ndarray, batch_size: int) -> PriorShares:
    """Expected over the orders that data/batch_sampler.py draws: each bucket's samples shuffled and cut into batches, the last one smaller.

    Args:
        buckets: (samples, 2), width and height. is_prior: (samples,), bool. repeats: (samples,).
    """
    if not is_prior.any():
        return PriorShares()
    _, kind = np.unique(buckets, axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    total = np.bincount(kind, repeats).astype(np.int64)
    kept = np.bincount(kind, repeats * is_prior).astype(np.int64)
    batches = some = only = 0.0
    for members, prior in zip(total.tolist(), kept.tolist(), strict=True):
        full, rest = divmod(members, batch_size)
        for count, size in ((full, batch_size), (int(rest > 0), rest)):
            if count:
                batches += count
                some += count * (1 - _chance(members - prior, members, size))
                only += count * _chance(prior, members, size)
    return PriorShares(some / batches, only / batches)


def _chance(wanted: int, members: int, size: int) -> float:
    """That so many different members are all wanted ones: prod (wanted - i) / (members - i)."""
    return float(np.prod((wanted - np.arange(size)).clip(0) / (members - np.arange(size))))


def rollout_passes(training: TrainingConfig, shares: PriorShares) -> float:
    """Of one micro-batch, on average. A batch of nothing but pictures that keep the model as it is has no rollout."""
    return (1 - shares.only) * training.rollout_probability * (1 + training.rollout_steps) / 2
