"""Runs in the background of a real ComfyUI: its queue stays free, they wait for each other, and survive its restart."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from chroma_trainer.trainer_core.runs.lock import is_held

from .conftest import CURRENT, OLDEST, Server, boot, open_page, root_of, start
from .test_own_process import ENDLESS, TRAINER, children, is_worker, listening, run_folder, shown, status_of, until

pytestmark = pytest.mark.comfyui
NEEDED = {"1", "2", "3", "4", TRAINER, "9"}
LATEST = {
    "1": {"class_type": "LatestCheckpoint", "inputs": {"run": "steady"}},
    "2": {"class_type": "CheckLoRA", "inputs": {"lora_model": ["1", 0]}},
    "3": {"class_type": "PreviewAny", "inputs": {"source": ["1", 2]}},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start(root_of(*CURRENT), tmp_path_factory.mktemp("background"))
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
        for process in workers(server):  # of a test that failed
            process.kill()


@pytest.fixture(scope="module")
def prompt(short_prompt: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A run in the background; the nodes behind the trainer are part of the graph."""
    return lambda name, **fields: short_prompt(name, background=True, eval_images=0, **{**ENDLESS, **fields})


def workers(server: Server) -> list[psutil.Process]:
    """The processes of this server's pack, whoever is their parent by now."""

    def is_own(process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return str(server.base) in " ".join(process.cmdline()) and is_worker(process)
        return False

    return [process for process in psutil.process_iter() if is_own(process)]


def queued(server: Server) -> dict[str, str]:
    return {entry["name"]: entry["state"] for entry in server.get("/chroma_trainer/runs")["queue"]}


def trains(server: Server, name: str) -> Path:
    """The folder of a run, once it has saved a checkpoint."""
    until(lambda: (folder := run_folder(server, name)) and list(folder.glob("checkpoints/step-*")), server)
    return run_folder(server, name) or Path()


def stop(server: Server, folder: Path) -> None:
    server.post(f"/chroma_trainer/runs/{folder.name}/stop", {})
    until(lambda: status_of(folder).state == "stopped" and folder.name.rpartition("-")[0] not in queued(server), server)


def test_comfyui_is_free_while_runs_wait_for_each_other(server, prompt):
    with listening(server) as messages:
        for name in ("steady", "later", "last"):
            history = server.run(prompt(name))  # returns at once, though the run has no end
            assert set(history["outputs"]) <= {TRAINER}, "nodes that need the LoRA did not run"
        folder = trains(server, "steady")
        assert queued(server) == {"steady": "training", "later": "waiting", "last": "waiting"}
        assert server.get("/queue") == {"queue_running": [], "queue_pending": []}
        (entry,) = (entry for entry in server.get("/chroma_trainer/runs")["queue"] if entry["name"] == "last")
        server.post(f"/chroma_trainer/queue/{entry['id']}/up", {})
        assert list(queued(server)) == ["steady", "last", "later"]
        server.post(f"/chroma_trainer/queue/{entry['id']}/remove", {})
        assert list(queued(server)) == ["steady", "later"]
    page = shown([message for message in messages if message.get("data", {}).get("name") == "steady"])
    assert page["steps"]["step"][:3] == [1, 2, 3] and page["memory"]
    texts = [path.read_text("utf-8") for path in (server.output / "chroma_trainer" / "queue").glob("*.json")]
    assert len(texts) == 2 and not any(str(server.base) in text for text in texts)

    first = server.run(LATEST)["outputs"]["3"]["text"]
    reached = status_of(folder).step
    until(lambda: status_of(folder).step > reached + 4, server)
    second = server.run(LATEST)["outputs"]["3"]["text"]
    assert int(second[0]) > int(first[0]) >= 2, "a new checkpoint is not taken from ComfyUI's cache"
    stop(server, folder)
    stop(server, trains(server, "later"))
    assert queued(server) == {} and children(server) == []

    server.run(prompt("steady"))  # the same graph resumes it
    until(lambda: status_of(folder).state == "running" and status_of(folder).step > 0, server)
    stop(server, folder)


@pytest.mark.browser
def test_the_sidebar_shows_and_orders_the_queue(server, short_workflow):
    play(server, short_workflow, "background-current")


@pytest.mark.browser
@pytest.mark.slow
def test_the_sidebar_of_the_oldest_comfyui(tmp_path_factory, short_workflow):
    server = start(root_of(*OLDEST), tmp_path_factory.mktemp("oldest"))
    try:
        play(server, short_workflow, "background-oldest")
    finally:
        server.stop()


def play(server: Server, short_workflow: Callable[..., dict[str, Any]], name: str) -> None:
    fields = {"lr_schedule": "constant", "warmup_steps": 0, "eval_images": 0}
    workflow = short_workflow("first", steps=100_000, background=True, **fields)
    seen = open_page(server).live("background", workflow, name)
    assert seen["faults"] == []
    assert seen["free"] == {"queue_running": [], "queue_pending": []}
    assert int(seen["stopped"]["points"]) >= int(seen["reloaded"]["points"]) >= int(seen["live"]["points"])
    until(lambda: queued(server) == {}, server)
    assert children(server) == []


@pytest.mark.skipif(sys.platform == "win32", reason="ComfyUI is ended by signals here")
def test_what_a_restart_of_comfyui_does(server, prompt):
    """A run that is not detached is saved and resumed, one that is goes on, and what waits still waits."""
    server.run(prompt("saved"))
    saved = trains(server, "saved")
    server.run(prompt("apart", detached=True))
    again = restart(server)
    status = status_of(saved)
    assert status.state == "stopped" and (saved / "checkpoints" / f"step-{status.step:06d}").is_dir()
    try:
        until(lambda: status_of(saved).state == "running" and status_of(saved).step > status.step, again)
        assert queued(again) == {"saved": "training", "apart": "waiting"}
        stop(again, saved)
        apart = trains(again, "apart")
        again.process.kill()
        again.process.wait()
        reached = status_of(apart).step
        until(lambda: status_of(apart).step > reached and is_held(apart), again)
        again = boot(server.root, server.base)
        with listening(again) as messages:
            until(lambda: any(message["type"] == "chroma_trainer.event" for message in messages), again)
            (run,) = (run for run in again.get("/chroma_trainer/runs")["runs"] if run["run"] == apart.name)
            assert (run["state"], run["alive"]) == ("running", True) and queued(again) == {"apart": "training"}
            stop(again, apart)
        assert shown(messages)["events"][-1]["state"] == "stopped"
    finally:
        again.stop()


def restart(server: Server) -> Server:
    """End ComfyUI as its user does, and start it again once the processes have ended."""
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    until(lambda: not workers(server), server)
    return boot(server.root, server.base)
