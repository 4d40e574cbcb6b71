"""Processes of torchrun and accelerate launch: one is a run like any other, several are refused."""

from __future__ import annotations

import pytest
from chroma_trainer.trainer_core.setup.preflight import launcher_problems, problems_of


@pytest.mark.parametrize("processes", [None, "1", "", "none"])
def test_one_process_is_a_run_like_any_other(monkeypatch, processes):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    assert launcher_problems() == []


def test_several_processes_are_refused(monkeypatch, workshop):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    (problem,) = problems_of(workshop.request(), workshop.host())
    assert problem.field == "WORLD_SIZE"
    assert "process 2 of 4, started by torchrun or accelerate launch, but a run trains on one device" in problem.message
