"""The chart of a sweep: a row for each run, whatever is known of it."""

from __future__ import annotations

import numpy as np
from chroma_trainer.trainer_core.plots.canvas import ROSE, TEAL
from chroma_trainer.trainer_core.plots.sweep_chart import ROW, TOP, SweepBar, draw_sweep_chart


def bar(label: str, **values) -> SweepBar:
    known = {
        "loss": 0.5, "difference": (0.02, 0.005), "is_best": False, "is_worse": False, "leak": (0.3, 0.05), "seconds": 70.0,
        "is_stopped": False, **values,
    }  # fmt: skip
    return SweepBar(label, **known)


def test_rows_have_the_colors_of_what_they_are():
    bars = [bar("rank 8", is_best=True, difference=None), bar("rank 16", is_worse=True), bar("猫" * 60)]
    page = np.asarray(draw_sweep_chart(bars, "cat: 3 of 3 runs"))

    def has(row: int, color) -> bool:
        return bool((page[TOP + row * ROW : TOP + (row + 1) * ROW] == color).all(axis=-1).any())

    assert [has(row, TEAL) for row in range(3)] == [True, False, False]
    assert [has(row, ROSE) for row in range(3)] == [False, True, False]


def test_unknown_values_leave_their_place_empty():
    for bars in (
        [],
        [bar("a", loss=None, difference=None, leak=None, seconds=None)],
        [bar("b", difference=(-0.1, 0.2))],
    ):
        assert draw_sweep_chart(bars, "x").height == TOP + ROW * max(1, len(bars)) + 50
