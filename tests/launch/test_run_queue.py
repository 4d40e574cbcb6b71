"""The queue of runs in the background: its order, what is written, and what is read back."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import ASSETS, Paths
from chroma_trainer.trainer_core.launch.background import BackgroundRuns
from chroma_trainer.trainer_core.launch.job import STOP
from chroma_trainer.trainer_core.launch.portable_job import pack, unpack
from chroma_trainer.trainer_core.launch.run_queue import (
    FAILED,
    TRAINING,
    Entry,
    RunQueue,
    describe_queue,
    new_job_folder,
    unfinished,
)
from chroma_trainer.trainer_core.runs.control import runs_in


@pytest.fixture
def queue(tmp_path: Path) -> RunQueue:
    return RunQueue(tmp_path)


def add(queue: RunQueue, name: str, **job: Any) -> Entry:
    return queue.add(name, "5", {"name": name, **job}, is_detached=False)


def names(queue: RunQueue) -> list[str]:
    return [entry.name for entry in RunQueue(queue.output).entries()]  # as another process reads them


def test_runs_wait_in_the_order_of_their_requests_and_survive_a_restart(queue: RunQueue):
    for name in "abc":
        add(queue, name)
    assert names(queue) == ["a", "b", "c"] and runs_in(queue.output) == []
    shown = describe_queue(queue)
    assert [(entry["name"], entry["place"], entry["state"]) for entry in shown] == [
        ("a", 1, "waiting"),
        ("b", 2, "waiting"),
        ("c", 3, "waiting"),
    ]
    assert "job" not in shown[0] and json.dumps(shown)


def test_a_run_moves_up_and_is_removed(queue: RunQueue):
    a, _, c = (add(queue, name) for name in "abc")
    queue.act(c.id, "up")
    assert names(queue) == ["a", "c", "b"]
    queue.act(a.id, "up")  # the first already
    queue.act(c.id, "up")
    before = unfinished["a"]
    queue.act(a.id, "remove")
    assert names(queue) == ["c", "b"] and unfinished["a"] == before + 1
    with pytest.raises(UserError, match="has left the queue"):
        queue.act(a.id, "up")


def test_no_run_moves_before_the_one_that_is_trained(queue: RunQueue):
    a, b, c = (add(queue, name) for name in "abc")
    queue.update(a, state=TRAINING)
    queue.act(b.id, "up")
    queue.act(c.id, "up")
    assert names(queue) == ["a", "c", "b"]


def test_the_same_run_is_not_added_twice(queue: RunQueue):
    first = add(queue, "a", rank=4)
    assert add(queue, "a", rank=4) == first and add(queue, "a", rank=8) != first
    queue.update(first, state=FAILED)
    assert add(queue, "a", rank=4).id != first.id


def test_a_run_that_waits_gets_the_new_devices(queue: RunQueue):
    def job(rank: int, devices: str) -> dict[str, Any]:
        return {"request": {"training": {"rank": rank, "devices": devices, "detached": devices == "2"}}, "prompt": {}}

    first = queue.add("a", "5", job(4, "1"), is_detached=False)
    changed = queue.add("a", "5", job(4, "2"), is_detached=True)
    assert (changed.id, changed.job, changed.is_detached) == (first.id, job(4, "2"), True)
    queue.update(first, state=TRAINING)
    assert queue.add("a", "5", job(4, "1"), is_detached=False).job == job(4, "2")  # it is too late
    assert queue.add("a", "5", job(8, "1"), is_detached=False).id != first.id


def test_a_run_that_is_being_started_is_asked_to_end(queue: RunQueue):
    entry, folder = add(queue, "a"), new_job_folder()
    queue.update(entry, state=TRAINING, job_folder=folder.name)
    queue.act(entry.id, "remove")
    assert (folder / STOP).exists() and names(queue) == ["a"]  # until it has ended
    (folder / STOP).unlink()
    folder.rmdir()


@pytest.mark.parametrize("name", ["", ".", "..", "/", "../victim", "chroma-trainer-/../victim"])
def test_a_damaged_file_names_no_folder_to_be_removed(queue: RunQueue, name: str):
    entry = replace(add(queue, "a"), job_folder=name)
    assert entry.job_path.name.startswith("chroma-trainer-") and not entry.job_path.exists()


def test_a_removed_run_does_not_come_back(queue: RunQueue):
    entry = add(queue, "a")
    queue.drop(entry)
    queue.update(entry, state=TRAINING)
    assert names(queue) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": "x"}', '{"id": 5, "place": "high"}'])
def test_a_damaged_file_is_set_aside(queue: RunQueue, text: str):
    add(queue, "a")
    (queue.folder / "x.json").write_text(text, "utf-8")
    assert names(queue) == ["a"] and names(queue) == ["a"]
    assert (queue.folder / "damaged-x.json").is_file()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_does_not_stop_the_list(queue: RunQueue):
    add(queue, "a")
    (queue.folder / "folder.json").mkdir()
    os.mkfifo(queue.folder / "pipe.json")
    (queue.folder / "gone.json").symlink_to(queue.folder / "nothing")
    assert names(queue) == ["a"] and [entry["name"] for entry in describe_queue(queue)] == ["a"]


def test_a_queue_that_cannot_be_written_is_said(queue: RunQueue, workshop: Any, tmp_path: Path):
    queue.folder.parent.mkdir()
    queue.folder.write_text("a file in its place", "utf-8")
    runs = BackgroundRuns(queue, lambda entry: workshop.host())
    with pytest.raises(UserError, match=r"background: the queue in .* can't be written"):
        runs.add(workshop.request(), {}, "5", Paths(tmp_path, tmp_path / "cache"))
    runs.turn()


def test_a_request_is_stored_without_paths_of_the_machine_and_without_secrets(workshop: Any, tmp_path: Path):
    request = workshop.request(background=True)
    images = tmp_path / "models here" / "datasets"
    paths = Paths(tmp_path / "out", tmp_path / "cache", {"vae": (tmp_path / "a", tmp_path / "b")}, (images,))
    part = replace(request.dataset.parts[0], folder=str(images / "cats"))
    request = replace(
        request,
        dataset=replace(request.dataset, parts=(part,), roots=(str(images / "cats"),)),
        model=replace(request.model, vae_file=str(tmp_path / "b" / "ae.safetensors"), repo=str(ASSETS / "chroma-nano")),
    )
    prompt = {
        "5": {"class_type": "X", "inputs": {"api_key": "my-own-key", "text": str(images / "cats"), "nan": float("nan")}}
    }
    packed = json.loads(json.dumps(pack(request, prompt, paths), allow_nan=False))
    text = json.dumps(packed)
    assert str(tmp_path) not in text and str(ASSETS) not in text and "my-own-key" not in text
    job = unpack(packed, paths, is_detached=True)
    assert (job.request, job.paths, job.is_detached) == (request, paths, True)
    assert job.prompt["5"]["inputs"] == {"api_key": "", "text": str(images / "cats"), "nan": None}
    moved = Paths(tmp_path / "out", tmp_path / "cache", {"vae": (tmp_path / "a", tmp_path / "new")}, (images,))
    assert unpack(packed, moved, False).request.model.vae_file == str(tmp_path / "new" / "ae.safetensors")
    with pytest.raises(UserError, match="models/vae/1"):
        unpack(packed, Paths(tmp_path / "out", tmp_path / "cache", {}, (images,)), False)
