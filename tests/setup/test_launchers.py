"""Processes of torchrun and accelerate launch: one is a run like any other, several share out the micro-batches of a step."""

from __future__ import annotations

import pytest
from chroma_trainer.trainer_core.setup.preflight import devices_problems, problems_of


@pytest.mark.parametrize("processes", [None, "1", "", "none"])
def test_one_process_is_a_run_like_any_other(monkeypatch, workshop, processes):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    assert devices_problems(workshop.request(), workshop.host()) == []


def test_processes_that_would_be_idle_are_refused(monkeypatch, workshop):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    assert problems_of(workshop.request(accumulation=4), workshop.host()) == []
    (problem,) = problems_of(workshop.request(accumulation=3), workshop.host())
    assert problem.field == "devices"
    assert "4 devices for 3 micro-batches a step (accumulation): 1 of them would have nothing to do" in problem.message
    assert "Set LoRATrainer.accumulation to 4 or a multiple, or use at most 3 devices" in problem.message
