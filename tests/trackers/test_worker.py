"""A tracker in a thread of its own: in order, told once when it fails, and never waited for but at the end."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.trainer_core.trackers import worker as lane_module
from chroma_trainer.trainer_core.trackers.dispatch import Smoothed
from chroma_trainer.trainer_core.trackers.tracker import Opening, flat
from chroma_trainer.trainer_core.trackers.worker import TrackerThread

OPENING = Opening(Path("run"), "a", {})


class Pen:
    """Writes down what it is called with. fails: the call that raises; waits: what every call waits for."""

    def __init__(self, fails: str = "", waits: threading.Event | None = None):
        self.calls, self.fails, self.waits = [], fails, waits

    def __call__(self, opening, tell) -> Any:  # a stand-in for a Tracker: it lacks what is not called here
        self._note("begin", opening.name)
        tell("it begins")
        return self

    def _note(self, name, *values):
        if self.waits:
            self.waits.wait(30)
        if name == self.fails:
            raise OSError(f"no {name}\nand more")
        self.calls.append((name, *values, threading.current_thread().name))

    def values(self, step, values):
        self._note("values", step)

    def close(self, failed):
        self._note("close", failed)


def driven(pen: Pen, steps: int = 3, seconds: float = 30.0) -> list[tuple[str, str]]:
    told = []
    lane = TrackerThread("pen", pen, lambda *what: told.append(what))
    lane.begin(OPENING)
    for step in range(steps):
        lane.put(lambda tracker, step=step: tracker.values(step, {}))
    lane.close(True, seconds)
    return told


def test_calls_arrive_in_order_in_another_thread():
    pen, thread = Pen(), "tracker pen"
    assert driven(pen) == [("it begins", "info")]
    assert pen.calls == [
        ("begin", "a", thread),
        *[("values", step, thread) for step in range(3)],
        ("close", True, thread),
    ]


@pytest.mark.parametrize("call", ["begin", "values", "close"])
def test_a_fault_is_told_once(call):
    pen = Pen(fails=call)
    told = driven(pen)
    assert told[-1] == (f"pen: no {call}; the run continues without it", "warning")
    assert [level for _, level in told].count("warning") == 1 and not any(name == call for name, *_ in pen.calls)


def test_one_that_hangs_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(lane_module, "LONGEST_QUEUE", 5)
    release = threading.Event()
    assert driven(Pen(waits=release), steps=20, seconds=0.05) == [
        ("pen: it is 5 calls behind; the run continues without it", "warning")
    ]
    pen = Pen(waits=release)
    assert driven(pen, seconds=0.05) == [("pen: it has not finished in 0 s; the run continues without it", "warning")]
    release.set()


def test_the_smoothed_loss_is_the_live_pages():
    """js/run_state.js, smoothed(): a share of 20 / 1000 of the newest, without the bias of its beginning; step 3 was skipped."""
    smoothed = Smoothed(1000)
    assert smoothed(1, 0.5) == pytest.approx(0.5)
    assert smoothed(2, 1.0) == pytest.approx((0.98 * 0.5 + 1.0) / 1.98)
    assert smoothed(4, 0.0) == pytest.approx(0.98**2 * (0.98 * 0.02 * 0.5 + 0.02) / (1 - 0.98**4))
    assert Smoothed(10).keep == 0.9 and Smoothed(100_000).keep == 0.995


def test_settings_by_name():
    nested = {
        "training": {"rank": 4, "name": "a", "resume": True},
        "parts": [{"repeats": 1}, {"repeats": 2}],
        "flux": None,
    }
    assert dict(flat(nested)) == {
        "training.rank": 4,
        "training.name": "a",
        "training.resume": True,
        "parts.0.repeats": 1,
        "parts.1.repeats": 2,
    }
