import itertools
import math

import pytest
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.config.training import LR_SCHEDULES, TrainingConfig
from chroma_trainer.trainer_core.optim.lr_schedule import learning_rate_at, rate_of

SCHEDULES = tuple(LR_SCHEDULES)


def rates(schedule, warmup_steps=20, num_steps=100, peak=1e-4, **shape):
    settings = {"peak": peak, "schedule": schedule, "warmup_steps": warmup_steps, "num_steps": num_steps, **shape}
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
def test_linear_and_cosine_fall_to_just_above_0(schedule):
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


def test_constant_with_warmup_is_constant_by_another_name():
    assert rates("constant_with_warmup") == rates("constant")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_endless_is_what_does_not_know_its_end(schedule):
    first = [rates(schedule, num_steps=n)[:90] for n in (100, 1000)]
    assert (first[0] == first[1]) == LR_SCHEDULES[schedule].endless


def test_polynomial_is_linear_at_power_1_and_squares_at_2():
    assert rates("polynomial", power=1.0) == rates("linear")
    assert rates("polynomial", 0, 50, 1.0, power=2.0) == pytest.approx([(1 - step / 50) ** 2 for step in range(50)])


def test_restarts_are_cosines_one_after_another():
    assert rates("cosine_with_restarts", num_cycles=1) == pytest.approx(rates("cosine"))
    fall = rates("cosine_with_restarts", 20, 100, num_cycles=4)[20:]
    one = rates("cosine", 0, 20)
    assert fall == pytest.approx(one * 4)
    ends = {"peak": 1.0, "schedule": "cosine_with_restarts", "warmup_steps": 0, "num_steps": 9, "num_cycles": 3}
    assert learning_rate_at(9, **ends) == pytest.approx(0)


def test_wsd_is_constant_and_falls_like_a_root_in_its_last_share():
    course = rates("wsd", 20, 120, 1.0, decay_share=0.25)[20:]
    assert course[:76] == [1.0] * 76
    assert course[75:] == pytest.approx([1 - math.sqrt(i / 25) for i in range(25)])
    assert rates("wsd", 0, 50, decay_share=1.0)[25] == pytest.approx(1e-4 * (1 - math.sqrt(0.5)))


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if not LR_SCHEDULES[name].endless])
def test_the_lowest_rate_is_reached_and_not_gone_below(schedule):
    course = rates(schedule, 0, 1000, 1.0, min_ratio=0.2, num_cycles=2)
    assert min(course) == pytest.approx(0.2, abs=0.03) and min(course) >= 0.2 and course[0] == 1.0
    assert course == pytest.approx([0.2 + 0.8 * f for f in rates(schedule, 0, 1000, 1.0, num_cycles=2)])


def test_a_run_takes_every_number_from_its_settings():
    optimizer = OptimizerConfig(lr_num_cycles=5, lr_power=3.0, lr_decay_share=0.5, lr_min_ratio=0.1)
    shape = {"num_cycles": 5, "power": 3.0, "decay_share": 0.5, "min_ratio": 0.1}
    for schedule in SCHEDULES:
        training = TrainingConfig(lr_schedule=schedule, learning_rate=2e-4, warmup_steps=7)
        assert [rate_of(step, training, optimizer, 40) for step in range(40)] == rates(schedule, 7, 40, 2e-4, **shape)
