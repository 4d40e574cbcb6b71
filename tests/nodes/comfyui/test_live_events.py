"""Messages to the page: every step arrives, in few messages, as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from chroma_trainer.nodes.comfyui.live_events import Feed, view_url
from chroma_trainer.trainer_core.errors import Cancelled
from chroma_trainer.trainer_core.host import (
    CheckpointSaved,
    LoraSaved,
    MemoryInUse,
    MemoryPlanned,
    Notice,
    PhaseProgress,
    PhaseStarted,
    PreviewReady,
    RunOpened,
    StepReport,
)
from chroma_trainer.trainer_core.runs.control import Status, write_status

OUTPUT = Path("/output")
FOLDER = OUTPUT / "chroma_trainer" / "cat-12345678"


class Wire:
    """What a page would receive, and a clock that only the test moves."""

    def __init__(self, **values):
        self.now, self.messages = 0.0, []
        self.feed = Feed(self.messages.append, "12:5", "cat", OUTPUT, clock=lambda: self.now, **values)

    def kinds(self) -> list[str]:
        return [message["kind"] for message in self.messages]

    def steps(self) -> list[int]:
        return [
            step for message in self.messages if message["kind"] == "StepReports" for step in message["steps"]["step"]
        ]


def step(number: int, total: int = 1000, loss: float = 0.5) -> StepReport:
    return StepReport(number, total, loss, 1e-4, 0.1, 0.01)


def test_every_step_arrives_in_at_most_ten_messages_a_second():
    wire = Wire()
    for i in range(1, 501):
        wire.now += 0.01
        wire.feed(step(i))
    wire.feed.close(None)
    assert wire.steps() == list(range(1, 501))
    assert 40 <= wire.kinds().count("StepReports") <= 51  # 5 seconds


def test_the_last_step_is_sent_at_once():
    wire = Wire()
    for i in (1, 2, 3):
        wire.feed(step(i, total=3))
    assert wire.steps() == [1, 2, 3]


@pytest.mark.parametrize("event", [PhaseStarted("save"), CheckpointSaved(2, FOLDER / "checkpoints"), Notice("x")])
def test_what_happens_next_comes_after_the_steps(event):
    wire = Wire()
    for i in (1, 2):
        wire.feed(step(i))
    wire.feed(event)
    assert wire.kinds() == ["StepReports", "StepReports", type(event).__name__] and wire.steps() == [1, 2]


def test_progress_is_thinned_but_for_its_end():
    wire = Wire()
    for i in range(1, 101):
        wire.feed(PhaseProgress("latents", i, 100))
    assert [message["done"] for message in wire.messages] == [1, 100]


def test_a_loss_that_is_no_number_is_none():
    wire = Wire()
    wire.feed(step(1, loss=math.nan))
    assert wire.messages[0]["steps"]["loss"] == [None]
    json.dumps(wire.messages, allow_nan=False)


def test_messages_say_node_run_and_address_of_pictures():
    wire = Wire()
    wire.feed(PhaseStarted("start"))
    wire.feed(RunOpened(FOLDER))
    wire.feed(PreviewReady(300, FOLDER / "validation" / "step-000300-64x96.png"))
    wire.feed(LoraSaved(OUTPUT / "loras" / "cat.safetensors", "0" * 64, 12, 12))
    assert [message["run"] for message in wire.messages] == ["", "cat-12345678", "cat-12345678", "cat-12345678"]
    assert {(message["node"], message["name"]) for message in wire.messages} == {("12:5", "cat")}
    picture = wire.messages[2]
    assert picture["url"] == (
        "/view?filename=step-000300-64x96.png&subfolder=chroma_trainer%2Fcat-12345678%2Fvalidation&type=output"
    )
    assert (picture["step"], picture["label"]) == (300, "64x96")
    assert wire.messages[3]["lora"] == "cat.safetensors"


def test_the_plan_of_the_memory_arrives():
    wire = Wire()
    wire.feed(MemoryPlanned(7, 9))
    assert (wire.messages[0]["device_bytes"], wire.messages[0]["ram_bytes"]) == (7, 9)


def test_a_picture_elsewhere_has_no_address():
    assert view_url(Path("/elsewhere/x.png"), OUTPUT) == ""


def test_memory_is_measured_once_a_second():
    asked = []

    def measure():
        asked.append(1)
        return {"kind": "RAM", "used": 5, "peak": 0, "total": 9}

    wire = Wire(memory_use=measure)
    for i in range(1, 31):
        wire.now += 0.1
        wire.feed(step(i))
    assert len(asked) == 3 and sum("memory" in message for message in wire.messages) == 3


@pytest.mark.parametrize(
    ("error", "by_user", "state"),
    [(None, False, "finished"), (Cancelled(), True, "stopped"), (ValueError("x"), False, "failed")],
)
def test_the_end_is_told(error, by_user, state):
    wire = Wire()
    wire.feed(PhaseStarted("start"))
    wire.feed.close(error, by_user)
    end = wire.messages[-1]
    assert (end["kind"], end["state"], end["message"]) == ("RunEnded", state, "x" if state == "failed" else "")


def test_the_run_folder_knows_the_end_better(tmp_path):
    folder = tmp_path / "chroma_trainer" / "cat-1"
    folder.mkdir(parents=True)
    write_status(folder, Status("paused", 3, 9))
    wire = Wire()
    wire.feed(RunOpened(folder))
    wire.feed.close(Cancelled(), by_user=True)
    assert wire.messages[-1]["state"] == "paused"


def test_a_node_that_told_nothing_ends_in_silence():
    wire = Wire()
    wire.feed.close(ValueError("x"))
    assert wire.messages == []


def test_the_memory_of_another_process_takes_the_place_of_one_s_own():
    wire = Wire(memory_use=lambda: {"kind": "RAM", "used": 1, "peak": 0, "total": 9})
    wire.feed(MemoryInUse("VRAM", 5, 6, 7))
    assert wire.messages == []
    wire.feed(PhaseStarted("start"))
    assert wire.messages[0]["memory"] == {"kind": "VRAM", "used": 5, "peak": 6, "total": 7}
