"""Runs in the background: one after the other, as bytes that a run in the foreground writes, also over a restart of ComfyUI."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.trainer_core.errors import Cancelled
from chroma_trainer.trainer_core.host import StepReport
from chroma_trainer.trainer_core.launch.background import BackgroundRuns
from chroma_trainer.trainer_core.launch.run_queue import FAILED, TRAINING, WAITING, Entry, RunQueue
from chroma_trainer.trainer_core.runs.control import read_status
from chroma_trainer.trainer_core.runs.control import request as send_command
from chroma_trainer.trainer_core.runs.lock import is_held
from chroma_trainer.trainer_core.train.run import run

from tests.distributed.jobs import bytes_of
from tests.workshop import DEVICE, Recorder

pytestmark = [
    pytest.mark.slow,  # each process imports torch
    pytest.mark.skipif(sys.platform == "win32", reason="processes are ended by signals here"),
    pytest.mark.skipif(DEVICE != "cpu", reason="the processes would not have the second device"),
]
VALUES = {"batch_size": 1, "steps": 6, "checkpoint_every": 2, "keep_checkpoints": 9, "background": True}
ENDLESS = {**VALUES, "steps": 100_000, "checkpoint_every": 50, "keep_checkpoints": 2}
SECONDS = 240
PROMPT = {"5": {"class_type": "LoRATrainer", "inputs": {}}}


@pytest.fixture(autouse=True)
def as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))


class Program:
    """What ComfyUI is here: it has a queue, and gets the events of its runs."""

    def __init__(self, output: Path, cache: Path):
        self.output, self.events, self.ends = output, [], []
        self.cache = cache
        self.runs = BackgroundRuns(RunQueue(output), self.host_of)

    def host_of(self, entry: Entry) -> Any:
        host = Recorder(self.output, self.cache, lambda event: self.events.append((entry.name, event)))
        object.__setattr__(host, "close", lambda error: self.ends.append((entry.name, error)))
        return host

    def add(self, request: Any) -> tuple[Entry, int]:
        return self.runs.add(request, PROMPT, "5", self.host_of(Entry("", 0, "", "", {})).paths)

    def until(self, condition: Callable[[], Any]) -> Any:
        end = time.monotonic() + SECONDS
        while not (value := condition()):
            assert time.monotonic() < end, (self.ends, self.events[-5:], self.runs.queue.entries())
            self.runs.turn()
            time.sleep(0.02)
        return value

    def steps(self, name: str) -> list[int]:
        return [event.step for of, event in self.events if of == name and isinstance(event, StepReport)]

    def finished(self, name: str) -> None:
        self.until(lambda: name in dict(self.ends))
        assert dict(self.ends)[name] is None

    def folder(self, name: str) -> Path:
        (folder,) = (self.output / "chroma_trainer").glob(f"{name}-*")
        return folder

    def bytes_of(self, name: str) -> dict[str, str]:
        return bytes_of(self.folder(name), self.output / "loras" / f"{name}.safetensors")


@pytest.fixture
def program(workshop: Any, tmp_path: Path) -> Callable[[], Program]:
    """program(): one that is started on the same output folder."""
    return lambda: Program(tmp_path, workshop.root / "cache")


def in_foreground(workshop: Any, **values: Any) -> dict[str, str]:
    host = workshop.host()
    run(workshop.request(**{**VALUES, **values}), host, PROMPT)
    return bytes_of(host.run_folder, host.lora)


def test_one_after_the_other_and_a_fault_does_not_stop_the_next(workshop: Any, program: Callable[[], Program]):
    comfyui = program()
    assert comfyui.add(workshop.request(**VALUES, name="wrong", targets="no_such_layer"))[1] == 0
    assert comfyui.add(workshop.request(**VALUES, name="first"))[1] == 1
    assert comfyui.add(workshop.request(**VALUES, name="second"))[1] == 2
    assert comfyui.add(workshop.request(**VALUES, name="second"))[1] == 2  # the same run
    comfyui.until(lambda: comfyui.steps("first"))
    wrong, second = [entry for entry in comfyui.runs.queue.entries() if entry.state != TRAINING]
    assert (wrong.state, second.state) == (FAILED, WAITING) and "no_such_layer" in wrong.message
    comfyui.finished("second")
    assert [name for name, _ in comfyui.ends] == ["wrong", "first", "second"]
    assert comfyui.steps("first") == comfyui.steps("second") == [*range(1, 7)]
    assert [entry.name for entry in comfyui.runs.queue.entries()] == ["wrong"]
    assert comfyui.bytes_of("first") == in_foreground(workshop, name="first")


def test_what_the_end_of_comfyui_interrupts_goes_on_after_its_restart(workshop: Any, program: Callable[[], Program]):
    before = program()
    before.add(workshop.request(**ENDLESS, name="long"))
    before.until(lambda: len(before.steps("long")) > 3)
    before.runs.close()  # as the operating system does
    folder = before.folder("long")
    before_end = time.monotonic() + SECONDS
    while is_held(folder) and time.monotonic() < before_end:
        time.sleep(0.05)
    status = read_status(folder)
    assert status and status.state == "stopped" and (folder / "checkpoints" / f"step-{status.step:06d}").is_dir()
    after = program()
    after.until(lambda: after.steps("long"))
    assert after.steps("long")[0] == status.step + 1
    send_command(folder, "stop")
    after.until(lambda: after.ends)
    assert isinstance(dict(after.ends)["long"], Cancelled) and after.runs.queue.entries() == []
    after.runs.close()


def test_a_detached_run_goes_on_and_is_found_again(workshop: Any, program: Callable[[], Program]):
    before = program()
    before.add(workshop.request(**ENDLESS, detached=True, name="apart"))
    before.until(lambda: len(before.steps("apart")) > 3)
    before.runs.close()
    after = program()
    after.until(lambda: after.steps("apart"))
    assert after.steps("apart")[0] > before.steps("apart")[-1], "the page has the earlier steps from the run's folder"
    (entry,) = after.runs.queue.entries()
    assert entry.run == after.folder("apart").name
    send_command(after.folder("apart"), "pause")
    after.until(lambda: after.ends)
    status = read_status(after.folder("apart"))
    assert status and status.state == "paused" and after.runs.queue.entries() == []
    assert not is_held(after.folder("apart"))
    after.runs.close()


def test_of_two_programs_one_is_in_charge(workshop: Any, program: Callable[[], Program]):
    first, second = program(), program()
    second.add(workshop.request(**VALUES, name="shared"))
    first.until(lambda: first.runs.queue.entries()[0].state == TRAINING)
    second.runs.turn()
    assert second.events == []
    second.runs.queue.act(first.runs.queue.entries()[0].id, "remove")  # before it has a folder
    first.until(lambda: first.ends)
    assert isinstance(dict(first.ends)["shared"], Cancelled) and first.runs.queue.entries() == []
    assert not list((first.output / "chroma_trainer").glob("shared-*"))
