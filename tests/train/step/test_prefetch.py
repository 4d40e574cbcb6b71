"""Micro-batches made ahead: the bytes of a run without, in a thread that is gone when the run is, however it ends.

On a CPU it is off; here it is turned on, without what only CUDA has: pinned memory and copies that nobody waits for.
"""

from __future__ import annotations

import threading

import pytest
import torch
from chroma_trainer.trainer_core.errors import Cancelled
from chroma_trainer.trainer_core.host import StepReport
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.train.step import loop as loop_module
from chroma_trainer.trainer_core.train.step import prefetch as ahead
from chroma_trainer.trainer_core.train.step.batch import Batch
from chroma_trainer.trainer_core.train.step.prefetch import BatchPrefetcher, is_worth_it


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("next-batch")]


@pytest.fixture
def made(monkeypatch):
    """Turns it on; [(number, whether in the thread)] of what was made."""
    found: list[tuple[int, bool]] = []
    make = loop_module.make_batch

    def noted(run_, micro):
        found.append((micro, threading.current_thread() is not threading.main_thread()))
        return make(run_, micro)

    monkeypatch.setattr(ahead, "is_worth_it", lambda device: True)
    monkeypatch.setattr(loop_module, "make_batch", noted)
    return found


def test_only_where_the_device_is_not_the_cpu():
    assert is_worth_it(torch.device("cuda")) and not is_worth_it(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_same_bytes_cancelled_and_gone_on(workshop, made, monkeypatch, accumulation):
    request = workshop.request(accumulation=accumulation)
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(request, host)
    assert threads() == []
    first, last = accumulation * 3, accumulation * 6
    assert made[:first] == [(micro, micro > 0) for micro in range(first)]  # one more may have been begun
    made.clear()
    resumed = run(request, host.cancelling_at(0))
    assert threads() == [] and made == [(micro, micro > first) for micro in range(first, last)]
    monkeypatch.undo()
    whole = run(request, workshop.host())
    assert resumed.losses == whole.losses and resumed.lora.sha256 == whole.lora.sha256


def test_a_fault_in_the_thread_ends_the_step_that_wanted_it(workshop, made, monkeypatch):
    make = loop_module.make_batch

    def broken(run_, micro):
        if micro == 3:
            raise RuntimeError("the shard is gone")
        return make(run_, micro)

    monkeypatch.setattr(loop_module, "make_batch", broken)
    host = workshop.host()
    with pytest.raises(RuntimeError, match="the shard is gone"):
        run(workshop.request(), host)
    assert [report.step for report in host.all(StepReport)] == [1, 2, 3] and threads() == []
    assert host.checkpoints[-1] == "step-000003"  # what was learnt is kept


def test_a_batch_that_was_not_expected_is_made_anew():
    def make(micro: int) -> Batch:
        numbers = torch.full((1,), float(micro))
        return Batch(numbers, numbers, numbers, [numbers], {"reference": numbers})

    batches = BatchPrefetcher(make, end=4)
    try:
        assert [batches.get(micro).sigma.item() for micro in (0, 1, 0, 1, 2, 3, 2)] == [0, 1, 0, 1, 2, 3, 2]
    finally:
        batches.close()
    assert threads() == []
    moved = make(3).to(torch.device("meta"))
    assert {moved.sigma.device.type, moved.text[0].device.type, moved.beside["reference"].device.type} == {"meta"}
