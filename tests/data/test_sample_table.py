"""Samples in files: what went in comes out, in slices and choices too, and few bytes stay in memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from chroma_trainer.trainer_core.data.buckets import Placement
from chroma_trainer.trainer_core.data.holdout import keeps_copies_together, num_held, split
from chroma_trainer.trainer_core.data.sample_table import BLOCK, Chosen, Sample, TableWriter, columns


def sample(i: int) -> Sample:
    name = f"fol-{i % 3}/ñ 猫 \udcff {i}.png"
    placement = Placement((64, 128 + i % 2 * 64), (70 + i, 128), (i % 7, 0))
    captions = ('a "cat"\\', "x\ny")[: 1 + i % 2]
    return Sample(f"{i % 2}/{name}", name, f"/d{i % 2}/{name}", f"{i:064x}", captions, (100 + i, 50), placement, i % 2)


def table(count: int):
    writer = TableWriter()
    for i in range(count):
        writer.append(sample(i))
    return writer.finish(lambda part, name: f"/d{part}/{name}")


def test_what_went_in_comes_out():
    samples, wanted = table(20), [sample(i) for i in range(20)]
    assert list(samples) == wanted and len(samples) == 20
    assert (
        samples[-1] == wanted[-1]
        and list(samples[3:15:4]) == wanted[3:15:4]
        and list(samples[::-1][:2]) == wanted[:-3:-1]
    )
    with pytest.raises(IndexError):
        samples[20]
    assert list(table(BLOCK + 3))[-5:] == [sample(i) for i in range(BLOCK - 2, BLOCK + 3)]


def test_none_at_all():
    assert list(table(0)) == [] and len(columns(table(0))) == 0


def test_choices_have_their_columns():
    chosen = Chosen(table(9), np.array([7, 2]))
    assert list(chosen) == [sample(7), sample(2)]
    assert (
        columns(chosen)["bucket"].tolist()
        == [[64, 192], [64, 128]]
        == columns([sample(7), sample(2)])["bucket"].tolist()
    )
    assert columns([sample(5)])["sha256"].tobytes().hex() == sample(5).sha256


def test_a_holdout_is_a_choice():
    trained, held = split(table(10), 0.3)
    assert (len(trained), len(held)) == (7, 3)
    assert sorted(s.sha256 for s in (*trained, *held)) == [sample(i).sha256 for i in range(10)]
    listed = split([sample(i) for i in range(10)], 0.3)
    assert [list(part) for part in listed] == [list(trained), list(held)]


def copies(count: int, times: int) -> list[Sample]:
    """Each image in several parts, as at several resolutions."""
    return [replace(sample(i), key=f"{part}/{i}", part=part) for part in range(times) for i in range(count)]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 0.25, 0.5])
def test_samples_of_one_image_are_held_out_together(share):
    samples = copies(12, 3)
    trained, held = split(samples, share)
    assert held and not {s.sha256 for s in held} & {s.sha256 for s in trained}
    assert len(held) <= max(3, share * len(samples)) and len(held) == num_held(samples, share)
    assert sorted(s.key for s in (*trained, *held)) == sorted(s.key for s in samples)
    assert keeps_copies_together(samples, share)


def test_a_single_image_is_split_all_the_same():
    samples = copies(1, 4)
    trained, held = split(samples, 0.3)
    assert (len(trained), len(held)) == (3, 1) == (4 - num_held(samples, 0.3), num_held(samples, 0.3))


def test_images_without_copies_are_chosen_one_by_one():
    assert not keeps_copies_together(table(10), 0.3) and num_held(table(10), 0.3) == 3
    assert num_held(table(10), 0) == 0 and not keeps_copies_together(table(10), 0)


@pytest.mark.slow
def test_rows_are_no_objects():
    tracemalloc.start()
    try:
        samples = table(20_000)
        assert tracemalloc.get_traced_memory()[0] < 20 * len(samples)  # a Sample takes more than a thousand bytes
        for _ in samples:
            pass
        assert tracemalloc.get_traced_memory()[0] < 20 * len(samples)
    finally:
        tracemalloc.stop()
