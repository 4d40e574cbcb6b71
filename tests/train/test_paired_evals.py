"""Evaluations compared image by image, and how often good runs raise a false alarm: in a simulation, not of real runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from chroma_trainer.trainer_core.train.figures.paired_evals import (
    Evaluation,
    change,
    gap,
    is_no_longer_better,
    overfits,
    slope,
    t_quantile,
    verdict,
)

NUM_EVALS = 20


def evaluation(judged: list[float], trained: list[float] = ()) -> Evaluation:  # type: ignore[assignment]
    as_losses = lambda values, name: {f"{name}{i}": (value, value + 0.2) for i, value in enumerate(values)}  # noqa: E731
    return Evaluation(as_losses(judged, "h"), as_losses(trained, "t"))


def test_the_error_is_that_of_the_differences():
    """The losses differ by 1 between images, and every image has improved by about 0.01."""
    old, new = evaluation([0.5, 1.5, 2.5, 3.5]), evaluation([0.49, 1.489, 2.491, 3.49])
    mean, error = change(new.judged, old.judged) or (0, 0)
    assert mean == pytest.approx(-0.01) and error == pytest.approx(np.std([1, -1, 0, 0], ddof=1) * 0.001 / 2)
    assert new.loss[1] > 50 * error
    assert change(new.judged, {"other": (1.0, 1.0)}) is None


def test_the_gap_is_by_noise_level_and_starts_at_zero():
    start = evaluation([1, 2, 3, 4], [5, 6, 7, 8])
    assert gap(start, start) == (0, 0)
    trained = {key: (first - 0.3, second - 0.1) for key, (first, second) in start.trained.items()}
    new = Evaluation(start.judged, trained)
    assert [round((gap(new, start, sigma) or (0, 0))[0], 9) for sigma in (0, 1)] == [0.3, 0.1]


def test_a_slope_is_as_certain_as_the_images_and_the_evaluations_are():
    line = {step: evaluation([1 + step, 2 + step, 3 + step]) for step in range(4)}
    assert slope(line) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    wavy = {step: evaluation([1 + step % 2, 2 + step % 2]) for step in range(4)}  # all images alike
    mean, error = slope(wavy) or (0, 0)
    assert mean == pytest.approx(0.2) and error > 0.2
    assert slope({0: evaluation([1, 2]), 1: evaluation([1, 2])}) is None


def test_quantiles_of_the_t_distribution():
    known = {2: 2.920, 3: 2.353, 4: 2.132, 7: 1.895, 15: 1.753, 30: 1.697, 1000: 1.646}  # of any table
    assert all(t_quantile(freedom) == pytest.approx(value, rel=0.004) for freedom, value in known.items())


def test_when_a_run_is_no_longer_better():
    def after(*losses: float) -> bool:
        return is_no_longer_better({at: evaluation([loss, loss + 1]) for at, loss in enumerate(losses)}, 2)

    assert after(5, 6, 7) and after(5, 4, 3, 4, 5)
    assert not after(5, 4, 3) and not after(5, 4, 3, 4)  # a new low, and one evaluation after it
    assert not after(5, 4, 1, 8, 2, 2.5)  # no new low, but lower than before it on average
    assert not after(5, 6) and not is_no_longer_better({0: evaluation([5])}, 2)


def test_a_loss_that_is_not_finite_decides_nothing_and_is_stored():
    runs = {0: evaluation([1, 2, 3, 4]), 1: evaluation([math.nan, 2, 3, 4])}
    result = verdict(runs, 1)
    assert result and result.best == 0 and not result.overfits
    stored = runs[1].as_json()
    assert stored["judged"]["h0"] == [None, None]
    assert math.isnan(Evaluation.from_json(stored).judged["h0"][0])


def simulate(kind: str, images: int, wander: float, seed: int) -> dict[int, Evaluation]:
    """Return losses of a run of NUM_EVALS evaluations.

    A run lowers the loss by 0.1, each image's by a factor of its own (lognormal, 0.5). Each loss has noise of 0.01. What
    moves all losses together, because the weights do, is an autoregressive process (0.7) of the standard deviation
    `wander`. Trained images improve by half more than held-out ones in a good run. In an overfit run they keep improving,
    and from 30 % of the run on the held-out ones lose twice as fast as they can gain.
    """
    rng, state, runs = np.random.default_rng(seed), 0.0, {}
    level = [rng.lognormal(-1, 0.5, (images, 4)) for _ in range(2)]
    factor = [rng.lognormal(0, 0.5, (images, 1)) for _ in range(2)]
    for at in range(NUM_EVALS + 1):
        x = at / NUM_EVALS
        learned = {"nothing": 0.0, "steady": -0.1 * x}.get(kind, -0.1 * (1 - math.exp(-6 * x)))
        rise = 0.08 * max(0.0, x - 0.3) if kind == "overfit" else 0.0
        memory = -0.1 * x if kind == "overfit" else 0.5 * learned
        state = 0.7 * state + math.sqrt(1 - 0.7**2) * rng.normal() * wander if at else 0.0
        noise = rng.normal(size=(2, images, 4)) * 0.01 * (at > 0)
        held, trained = (
            level[i] + move * factor[i] + state + noise[i] for i, move in enumerate((learned + rise, learned + memory))
        )
        runs[at] = Evaluation(*({str(i): row.tolist() for i, row in enumerate(rows)} for rows in (held, trained)))
    return runs


def first(runs: dict[int, Evaluation], happens) -> int | None:
    return next((at for at in runs if at and happens({step: runs[step] for step in runs if step <= at})), None)


# By how much the weights wander: 2 % and 10 % of what the run learns. Of 100 seeds 0 to 7 raise a false alarm.
@pytest.mark.parametrize("wander", [0.002, 0.01])
@pytest.mark.parametrize("kind", ["good", "nothing"])
@pytest.mark.parametrize(
    "images", [pytest.param(4, marks=pytest.mark.slow), 8, pytest.param(16, marks=pytest.mark.slow)]
)
def test_false_alarms_are_rare(kind, images, wander):
    alarms = [first(simulate(kind, images, wander, seed), overfits) for seed in range(20)]
    assert sum(alarm is not None for alarm in alarms) <= 1


@pytest.mark.parametrize(("images", "least"), [(4, 0.7), (8, 0.95), (16, 0.95)])
def test_overfitting_is_noticed(images, least):
    alarms = [first(simulate("overfit", images, 0.002, seed), overfits) for seed in range(20)]
    noticed = [alarm for alarm in alarms if alarm]
    assert len(noticed) / 20 >= least and min(noticed) > 6  # not before it begins


@pytest.mark.parametrize("wander", [0.002, 0.01])
@pytest.mark.parametrize(
    "images", [pytest.param(4, marks=pytest.mark.slow), 8, pytest.param(16, marks=pytest.mark.slow)]
)
def test_stopping(images, wander):
    """With patience 3: a run that overfits ends soon after its best step, one that learns steadily does not.

    Where the weights wander by twice what an evaluation improves, half of the steady runs may be ended.
    """

    def stops(runs):
        return is_no_longer_better(runs, 3)

    steady = [first(simulate("steady", images, wander, seed), stops) for seed in range(20)]
    overfit = [first(simulate("overfit", images, wander, seed), stops) for seed in range(20)]
    assert sum(at is not None for at in steady) <= (0 if wander < 0.01 else 10)
    assert all(at and 5 < at <= 18 for at in overfit)
