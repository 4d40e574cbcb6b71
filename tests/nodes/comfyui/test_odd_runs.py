"""One odd run folder does not break the list of runs, and a history of any size is read in bounded pieces."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from chroma_trainer.nodes.comfyui import event_history
from chroma_trainer.nodes.comfyui.http_routes import SharedAnswers
from chroma_trainer.nodes.comfyui.run_history import Backlog
from chroma_trainer.trainer_core.runs import control
from chroma_trainer.trainer_core.runs.control import Status, read_status, runs_in, write_status

RECORD = {"request": {"training": {"name": "cat", "rank": 4}}, "workflow": {}}


def make_run(output: Path, name: str = "cat-12345678") -> Path:
    folder = output / "chroma_trainer" / name
    folder.mkdir(parents=True)
    write_status(folder, Status("finished", 3, 3, "save", 0, 1.0))
    (folder / "request.json").write_text(json.dumps(RECORD), "utf-8")
    return folder


def put(name: str, text: str | bytes):
    def call(folder: Path) -> None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return call


def as_folder(name: str):
    def call(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return call


def as_fifo(name: str):
    def call(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return call


ODD = {
    "status: a text for a number": put("status.json", '{"state": "running", "step": "many"}'),
    "status: NaN": put("status.json", '{"state": "finished", "updated": NaN}'),
    "status: infinite": put("status.json", '{"state": "finished", "updated": 1e999}'),
    "status: deep": put("status.json", "[" * 100_000),
    "status: digits": put("status.json", '{"state": "finished", "step": ' + "9" * 5000 + "}"),
    "status: another state": put("status.json", '{"state": ["finished"]}'),
    "status: a list": put("status.json", "[]"),
    "status: no text": put("status.json", b"\xff\xfe\x00"),
    "status: large": put("status.json", b" " * (control.MAX_BYTES + 1)),
    "status: folder": as_folder("status.json"),
    "request: a list": put("request.json", "[1]"),
    "request: types": put("request.json", '{"request": {"training": [1]}, "workflow": {}}'),
    "request: name": put("request.json", '{"request": {"training": {"name": 5}}}'),
    "request: long name": put("request.json", '{"request": {"training": {"name": "%s"}}}' % ("x" * 5000)),
    "request: path as name": put("request.json", '{"request": {"training": {"name": "../../secret"}}}'),
    "request: workflow": put("request.json", '{"request": {}, "workflow": [1]}'),
    "request: NaN": put("request.json", '{"request": {"x": NaN}, "workflow": {}}'),
    "request: deep": put("request.json", '{"request": ' + '{"a":' * 500 + "1" + "}" * 501),
    "request: cut": put("request.json", '{"request": {"tra'),
}  # fmt: skip
if hasattr(os, "mkfifo"):
    ODD |= {"status: fifo": as_fifo("status.json"), "request: fifo": as_fifo("request.json")}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_run_is_listed_as_unreadable_and_the_others_as_always(tmp_path, kind):
    good = make_run(tmp_path)
    before = Backlog(tmp_path).runs()
    odd = make_run(tmp_path, "odd-87654321")
    ODD[kind](odd)
    backlog = Backlog(tmp_path)
    runs = {run["run"]: run for run in backlog.runs()}
    assert [runs[good.name]] == before
    assert runs[odd.name]["state"] == "unreadable" and runs[odd.name]["message"] and not runs[odd.name]["alive"]
    assert runs[odd.name].keys() == runs[good.name].keys()
    assert json.loads(json.dumps(backlog.story(odd), allow_nan=False))["summary"]["state"] == "unreadable"


WORKFLOWS = ["5", '{"1": 5}', '{"1": {"class_type": "LoRATrainer", "inputs": [1]}}', '{"1": {"class_type": ["x"]}}']


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_an_odd_workflow_names_no_node(tmp_path, workflow):
    put("request.json", f'{{"request": {{}}, "workflow": {workflow}}}')(make_run(tmp_path))
    assert Backlog(tmp_path).runs()[0]["node"] in ("", "1")


def test_a_folder_that_is_removed_while_listing_is_left_out(tmp_path, monkeypatch):
    make_run(tmp_path)
    gone = make_run(tmp_path, "gone-87654321")
    list_names = os.listdir

    def list_and_remove(path):
        names = list_names(path)
        shutil.rmtree(gone, ignore_errors=True)
        return names

    monkeypatch.setattr(os, "listdir", list_and_remove)
    assert [path.name for path in runs_in(tmp_path)] == ["cat-12345678"]


LINES = [
    b"[" * 100_000,
    b"5",
    b'{"kind": []}',
    b'{"kind": "StepReport", "step": "1"}',
    b'{"kind": "StepReport", "step": 1e999, "loss": 1, "learning_rate": 1, "grad_norm": 1, "seconds": 1}',
    b'{"kind": "PreviewReady", "step": 1, "path": "/etc/passwd"}',
    b'{"kind": "PreviewReady", "step": 1, "path": "../../secret.png"}',
    b'{"kind": "PreviewReady", "step": 1, "path": "%s"}' % (b"x" * 3000),
    b'{"kind": "PreviewReady", "step": 1, "path": "a\\u0000.png"}',
    b'{"kind": "PreviewReady", "step": 1, "path": "\\ud800.png"}',
    b'{"kind": "Notice", "text": {}, "level": 3}',
    b'{"kind": "MemoryPlanned", "device_bytes": NaN, "ram_bytes": 1}',
    b'{"kind": "PhaseStarted", "phase": "train", "total": Infinity}',
    b'{"kind": "Resumed", "step": []}',
    b"\xff\x00\x9b",
]


def step(number: int, loss: object = 0.5) -> dict:
    return {"kind": "StepReport", "step": number, "loss": loss, "learning_rate": 1e-4, "grad_norm": 1.0, "seconds": 0.1}


def write_events(folder: Path, *events: dict) -> None:
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def test_odd_lines_are_left_out_of_a_history(tmp_path):
    folder = make_run(tmp_path)
    write_events(folder, step(1))
    with (folder / "events.jsonl").open("ab") as file:
        file.writelines(line + b"\n" for line in LINES)
    write_events(folder, step(2, "high"))
    story = json.loads(json.dumps(Backlog(tmp_path).story(folder), allow_nan=False))
    assert story["steps"]["step"] == [1, 2] and story["steps"]["loss"] == [0.5, None]
    assert (story["pictures"], story["notices"], story["plan"]) == ([], [], {})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_an_event_log_that_is_a_fifo_is_none(tmp_path):
    folder = make_run(tmp_path)
    as_fifo("events.jsonl")(folder)
    assert Backlog(tmp_path).story(folder)["steps"]["step"] == []


def test_a_large_history_is_sampled_and_its_end_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(event_history, "MAX_READ", 64 << 10)
    monkeypatch.setattr(event_history, "SAMPLE_BYTES", 512)
    folder = make_run(tmp_path)
    (folder / "validation").mkdir()
    (folder / "validation" / "step-000100-64x64.png").write_bytes(b"png")
    (folder / "checkpoints" / "step-000100").mkdir(parents=True)
    write_events(folder, *(step(i, float(i)) for i in range(1, 20_001)))
    write_events(
        folder, {"kind": "CheckpointSaved", "step": 20_000}, {"kind": "Notice", "text": "end", "level": "info"}
    )
    size = (folder / "events.jsonl").stat().st_size
    bytes_read = []
    parse = event_history.RunHistory._apply_lines
    monkeypatch.setattr(
        event_history.RunHistory,
        "_apply_lines",
        lambda self, lines: (bytes_read.append(len(lines)), parse(self, lines)),
    )
    backlog = Backlog(tmp_path)
    story = backlog.story(folder)
    assert sum(bytes_read) <= event_history.MAX_READ + event_history.NUM_SAMPLES * 512 < size / 10
    numbers, losses = story["steps"]["step"], story["steps"]["loss"]
    assert numbers == sorted(numbers) and numbers[0] < 200 and numbers[-1] == 20_000
    assert len([number for number in numbers if number < 19_000]) > 100  # the early part of the curve has points
    assert all(abs(number - loss) <= 20_000 for number, loss in zip(numbers, losses, strict=True))
    assert story["checkpoints"] == [100, 20_000] and [image["step"] for image in story["pictures"]] == [100]
    assert story["notices"] == [{"text": "end", "level": "info"}]
    bytes_read.clear()
    write_events(folder, step(20_001))
    assert backlog.story(folder, 20_000)["steps"]["step"] == [20_001] and sum(bytes_read) < 300  # only the new line


def test_long_curves_are_thinned_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(event_history, "MAX_STEPS", 100)
    folder = make_run(tmp_path)
    write_events(folder, *(step(i) for i in range(1, 1001)))
    steps = Backlog(tmp_path).story(folder)["steps"]["step"]
    assert len(steps) <= 100 and steps[-1] == 1000 and steps == sorted(steps)


def test_a_history_that_is_being_read_delays_no_other(tmp_path):
    slow, quick = make_run(tmp_path, "slow-12345678"), make_run(tmp_path, "quick-12345678")
    backlog = Backlog(tmp_path)
    with backlog._history_of(slow).lock:
        thread = threading.Thread(target=lambda: (backlog.story(quick), backlog.runs()), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()


def test_simultaneous_requests_share_a_computation_that_began_after_them():
    calls = []

    async def ask_all() -> list[bytes]:
        shared = SharedAnswers()
        first = asyncio.ensure_future(shared.get("runs", lambda: calls.append(1) or len(calls)))
        while not calls:
            await asyncio.sleep(0)
        others = [shared.get("runs", lambda: calls.append(1) or len(calls)) for _ in range(1000)]
        return [await first, *await asyncio.gather(*others)]

    answers = asyncio.run(ask_all())
    assert answers == [b"1"] + [b"2"] * 1000 and len(calls) == 2


def test_a_status_has_its_types_or_is_none(tmp_path):
    folder = make_run(tmp_path)
    assert read_status(folder) == Status("finished", 3, 3, "save", 0, 1.0)
    put("status.json", '{"state": "failed", "message": "x", "later": [1]}')(folder)
    assert read_status(folder) == Status("failed", message="x")  # a later version may add fields
