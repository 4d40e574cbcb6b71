import math

import numpy as np
import pytest
from chroma_trainer.trainer_core.config.training import SIGMA_DENSITIES
from chroma_trainer.trainer_core.plots.canvas import AMBER, BLUE, PAPER, ROSE, TEAL
from chroma_trainer.trainer_core.plots.density_chart import bin_shares, density_text, draw_density
from chroma_trainer.trainer_core.plots.loss_chart import (
    Marker,
    StepPoint,
    draw_loss_chart,
    half_life_of,
    nice_ticks,
    smooth,
)


def history(n=200, loss=lambda i: 0.5, rate=lambda i: 1e-4):
    return [StepPoint(i + 1, loss(i), rate(i)) for i in range(n)]


def count(image, colour):
    return int((np.asarray(image) == np.array(colour, dtype=np.uint8)).all(-1).sum())


def rows_of(image, colour, column):
    return np.where((np.asarray(image)[:, column] == np.array(colour, dtype=np.uint8)).all(-1))[0]


@pytest.mark.parametrize("half_life", [1.0, 3.0, 50.0])
def test_smoothing_keeps_what_is_constant(half_life):
    assert smooth([0.7] * 30, half_life) == pytest.approx([0.7] * 30)


def test_smoothing_is_the_weighted_mean_it_says():
    values, decay = [3.0, -1.0, 4.0, 1.0, -5.0], 2 ** (-1 / 2.5)
    for t, value in enumerate(smooth(values, 2.5)):
        weights = [decay ** abs(t - s) for s in range(5)]
        assert value == pytest.approx(sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights))


def test_the_last_smoothed_value_is_adams_corrected_mean():
    values, decay, mean = [0.9, 0.4, 0.6, 0.1], 2 ** (-1 / 3), 0.0
    for value in values:
        mean = decay * mean + (1 - decay) * value
    assert smooth(values, 3.0)[-1] == pytest.approx(mean / (1 - decay**4))


def test_smoothing_does_not_lag():
    ramp = [0.01 * i for i in range(200)]
    assert smooth(ramp, 5.0)[100] == pytest.approx(ramp[100])


def test_half_life_grows_with_the_run():
    assert half_life_of(10) == 3 and half_life_of(1000) == 20


TICKED = [(0, 1), (0.0931, 0.7), (-3, 12345), (1e-7, 3e-7), (0.5, 0.5), (0, 0), (999, 1000)]


@pytest.mark.parametrize("low, high", TICKED)
def test_ticks_are_round_and_enclose(low, high):
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert 2 <= len(ticks) <= 12
    assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= high - 1e-6 * step
    assert ticks == pytest.approx([ticks[0] + i * step for i in range(len(ticks))])
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6


def test_a_falling_loss_falls_in_the_picture():
    page = draw_loss_chart(history(300, lambda i: 1 - i / 300))
    early, late = rows_of(page, BLUE, 200), rows_of(page, BLUE, 1100)
    assert len(early) and len(late) and early.mean() + 200 < late.mean()


def test_the_learning_rate_has_its_own_axis():
    page = draw_loss_chart(history(300, rate=lambda i: 1e-4 * (1 - i / 300)))
    early, late = rows_of(page, AMBER, 200), rows_of(page, AMBER, 1100)
    assert early.max() + 200 < late.max()


def test_markers_are_drawn_in_their_colours_only_when_there_are_some():
    bare = draw_loss_chart(history())
    marked = draw_loss_chart(history(), [Marker(50, "checkpoint"), Marker(0, "validation"), Marker(9999, "validation")])
    assert count(bare, TEAL) == count(bare, ROSE) == 0
    assert count(marked, TEAL) > 20 and count(marked, ROSE) > 20


def test_one_wild_step_does_not_flatten_the_rest():
    def loss(i):
        return 1000.0 if i == 150 else 0.5 + 0.1 * math.sin(i / 20)

    page = draw_loss_chart(history(300, loss))
    rows = np.concatenate([rows_of(page, BLUE, column) for column in range(150, 500)])
    assert rows.max() - rows.min() > 8  # the waves can still be seen


@pytest.mark.parametrize(
    "points",
    [
        [],
        history(1),
        history(2),
        history(5, lambda i: 0.0, lambda i: 0.0),
        history(5, lambda i: math.nan),
        history(9, lambda i: math.inf if i == 4 else 0.3),
        [StepPoint(5001 + i, 0.4, 1e-4) for i in range(3)],
        history(20_000, lambda i: 0.3 + 0.2 * math.sin(i)),
        history(5, lambda i: -0.5),
        history(5, lambda i: 1e9 + i),
    ],
    ids=["none", "one", "two", "zero", "nan", "inf", "resumed", "long", "negative", "huge"],
)
def test_any_history_gives_a_picture(points):
    page = draw_loss_chart(points, [Marker(1, "checkpoint")])
    assert page.size == (1280, 680) and page.getpixel((1, 1)) == PAPER
    assert count(page, PAPER) < 1280 * 680 - 500


def test_charts_are_the_same_each_time():
    assert draw_loss_chart(history()).tobytes() == draw_loss_chart(history()).tobytes()


@pytest.mark.parametrize("name", SIGMA_DENSITIES)
@pytest.mark.parametrize("shift", [1.0, 3.158])
def test_every_density_is_drawn_and_told(name, shift):
    shares = bin_shares(name, shift, 50)
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    assert draw_density(name, shift).size == (1280, 520)
    lines = density_text(name, shift).splitlines()
    assert len(lines) == 8 and all(len(line) <= 50 for line in lines)
    assert lines[-1].startswith("0 image") and lines[-1].endswith("noise 1")


def test_the_text_shows_the_hole_and_the_peak():
    *rows, _, _ = density_text("quadratic_tail_legacy", width=40).splitlines()
    assert rows[-1][:10].strip() == rows[-1][:10] and rows[-1][11:29].strip() == ""
    *rows, _, _ = density_text("uniform", width=40).splitlines()
    assert rows == ["█" * 40] * 6


def test_text_for_consoles_without_block_characters():
    assert density_text("chroma", ascii_only=True).isascii()
    assert density_text("chroma", width=60, height=3).count("\n") == 4
