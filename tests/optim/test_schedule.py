import itertools
import math

import pytest
from chroma_trainer.trainer_core.optim.schedule import learning_rate_at

SCHEDULES = ("constant", "linear", "cosine")


def rates(schedule, warmup_steps=20, num_steps=100, peak=1e-4):
    settings = {"peak": peak, "schedule": schedule, "warmup_steps": warmup_steps, "num_steps": num_steps}
    return [learning_rate_at(step, **settings) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps, num_steps", [(0, 1), (0, 100), (20, 100), (99, 100), (100, 100), (500, 100)])
def test_every_step_has_a_rate_above_0_and_at_most_the_peak(schedule, warmup_steps, num_steps):
    assert all(0 < rate <= 1e-4 for rate in rates(schedule, warmup_steps, num_steps))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_climbs_evenly_to_the_peak(schedule):
    climb = rates(schedule)[:21]
    assert climb == pytest.approx([1e-4 * (step + 1) / 21 for step in range(21)])
    assert climb[20] == 1e-4


def test_constant_stays():
    assert rates("constant")[20:] == [1e-4] * 80


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_others_fall_to_just_above_0(schedule):
    fall = rates(schedule)[20:]
    assert all(a > b for a, b in itertools.pairwise(fall))
    assert 0 < fall[-1] <= 1e-4 / 80
    end = learning_rate_at(100, peak=1e-4, schedule=schedule, warmup_steps=20, num_steps=100)
    assert end == pytest.approx(0, abs=1e-18)


def test_half_way_down_is_half_the_peak():
    for schedule in ("linear", "cosine"):
        assert rates(schedule, 20, 100)[60] == pytest.approx(0.5e-4)


def test_cosine_is_a_half_cosine():
    fall = rates("cosine", 0, 50, 1.0)
    assert fall == pytest.approx([(1 + math.cos(math.pi * step / 50)) / 2 for step in range(50)])


def test_rates_scale_with_the_peak():
    assert rates("cosine", peak=2e-4) == pytest.approx([2 * rate for rate in rates("cosine")])
