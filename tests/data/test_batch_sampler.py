"""Each sample `repeats` times an epoch, in an order that is a pure function of the seed and the number of the batch."""

from __future__ import annotations

from collections import Counter

import pytest
from chroma_trainer.trainer_core.data.batch_sampler import BatchPlan

WIDE, TALL, SQUARE = (96, 48), (48, 96), (64, 64)
BUCKETS = [WIDE, TALL, SQUARE, SQUARE, WIDE, SQUARE, TALL, SQUARE]
REPEATS = [1, 2, 3, 1, 5, 1, 1, 2]


def plan(batch_size: int = 3, seed: int = 0) -> BatchPlan:
    return BatchPlan(BUCKETS, REPEATS, batch_size, seed)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_in_every_epoch_each_sample_is_seen_as_often_as_it_is_repeated(batch_size):
    batches = plan(batch_size)
    for epoch in range(4):
        first = epoch * batches.batches_per_epoch
        epoch_batches = [batches.batch(first + i) for i in range(batches.batches_per_epoch)]
        assert Counter(i for batch in epoch_batches for i in batch) == dict(enumerate(REPEATS))
        assert all(len({BUCKETS[i] for i in batch}) == 1 and 1 <= len(batch) <= batch_size for batch in epoch_batches)


def test_a_batch_is_a_pure_function_of_its_number():
    forwards = [plan().batch(k) for k in range(60)]
    batches = plan()
    assert [batches.batch(k) for k in reversed(range(60))] == forwards[::-1]
    assert plan().batch(37) == forwards[37]


def test_seeds_and_epochs_give_other_orders():
    a, b = plan(1), plan(1, seed=1)
    size = a.batches_per_epoch
    assert [a.batch(k) for k in range(size)] != [b.batch(k) for k in range(size)]
    assert [a.batch(k) for k in range(size)] != [a.batch(k) for k in range(size, 2 * size)]


def test_no_place_is_preferred():
    first = Counter(BatchPlan([SQUARE] * 4, [1] * 4, 1, seed).batch(0)[0] for seed in range(400))
    assert all(60 < first[i] < 140 for i in range(4))


def test_the_arithmetic_in_words():
    assert plan(3).explain(100, 2) == (
        "8 images x repeats = 16 samples; batch 3 x accumulation 2 -> 6 batches per epoch; 100 steps = 33.3 epochs"
    )
    assert (
        BatchPlan([SQUARE] * 4, [1] * 4, 2, 0).explain(10, 1)
        == "4 images; batch 2 -> 2 batches per epoch; 10 steps = 5.0 epochs"
    )


def test_one_image_is_enough():
    assert [BatchPlan([SQUARE], [1], 4, 0).batch(k) for k in range(3)] == [(0,)] * 3
