"""Every second belongs to exactly one phase."""

from __future__ import annotations

import pytest
from chroma_trainer.trainer_core.train import phase_timer as phases_module
from chroma_trainer.trainer_core.train.phase_timer import NAMES, PhaseTimer


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def wait(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(phases_module.time, "perf_counter", lambda: clock.now)
    return clock


def test_entering_a_phase_pauses_the_one_around_it(clock):
    phases = PhaseTimer()
    clock.wait(1)
    with phases("train"):
        clock.wait(10)
        with phases("validate"):
            clock.wait(3)
        clock.wait(10)
    clock.wait(0.5)
    seconds = phases.read()
    assert list(seconds) == list(NAMES)
    assert (seconds["start"], seconds["train"], seconds["validate"]) == (1.5, 20, 3)
    assert sum(seconds.values()) == clock.now - 100


def test_a_phase_that_ends_by_a_fault_ends(clock):
    phases = PhaseTimer()
    with pytest.raises(ValueError), phases("load"):
        clock.wait(2)
        raise ValueError
    clock.wait(4)
    assert phases.read()["load"] == 2 and phases.read()["start"] == 4


def test_the_running_phase_counts(clock):
    phases = PhaseTimer()
    with phases("save"):
        clock.wait(2)
        assert phases.read()["save"] == 2
        clock.wait(1)
    assert phases.read()["save"] == 3
