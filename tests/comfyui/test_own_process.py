"""Training in processes of its own: files, messages and ends are those of a training in ComfyUI's process."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from chroma_trainer.trainer_core.runs.control import Status, read_status
from chroma_trainer.trainer_core.runs.lock import RunLock, is_held

from .conftest import CURRENT, PROJECT, Server, faults_of, root_of, start

pytestmark = pytest.mark.comfyui
SECONDS = 60
NANO = PROJECT / "assets" / "chroma-nano" / "transformer" / "diffusion_pytorch_model.safetensors"
TRAINER = "5"
ENDLESS = {"steps": 100_000, "lr_schedule": "constant"}
OF_A_MOMENT = {"events.jsonl", "status.json", "report.json", "ranks", "launch.json"}  # times, process ids, memory, logs


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose base model lies in a folder that only its extra_model_paths name."""
    root, base = root_of(*CURRENT), tmp_path_factory.mktemp("own-process")
    extra = tmp_path_factory.mktemp("extra")
    shutil.copy(NANO, extra / "nano.safetensors")
    (base / "extra.yaml").write_text(f"other:\n  base_path: {extra}\n  diffusion_models: .\n", "utf-8")
    server = start(root, base, "--extra-model-paths-config", str(base / "extra.yaml"))
    try:
        yield server
    finally:
        if server.process.poll() is None:  # the last test ends it
            server.stop()


@pytest.fixture(scope="module")
def prompt(short_prompt: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def build(name: str, **fields: Any) -> dict[str, Any]:
        workflow = short_prompt(name, **{"accumulation": 2, "eval_images": 2, **fields})
        workflow["1"]["inputs"]["diffusion_model"] = "nano.safetensors"
        needed = {"1", "2", "3", "4", TRAINER, "9"}
        return {key: node for key, node in workflow.items() if key in needed}

    return build


def until(condition: Callable[[], Any], server: Server) -> Any:
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, server.log[-3000:]
        time.sleep(0.1)
    return value


def run_folder(server: Server, name: str) -> Path | None:
    return next((server.output / "chroma_trainer").glob(f"{name}-*"), None)


def children(server: Server) -> list[psutil.Process]:
    every = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in every if is_worker(child)]


def is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.Error):  # it has ended at this moment
        return "worker" in process.cmdline()
    return False


def training(server: Server, name: str) -> tuple[Path, psutil.Process]:
    """The folder of a run that has saved a checkpoint, and the process that trains it."""
    until(lambda: (folder := run_folder(server, name)) and list(folder.glob("checkpoints/step-*")), server)
    (child,) = children(server)
    return run_folder(server, name) or Path(), child


def status_of(folder: Path) -> Status:
    status = read_status(folder)
    assert status
    return status


@contextmanager
def listening(server: Server) -> Iterator[list[dict[str, Any]]]:
    """Collect the messages to the page, over a websocket as the page has one."""
    messages: list[dict[str, Any]] = []
    is_open, over = threading.Event(), threading.Event()

    async def listen() -> None:
        address = server.url.replace("http", "ws") + "/ws?clientId=listener"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            is_open.set()
            while not over.is_set():
                try:
                    message = await socket.receive(0.2)
                except asyncio.TimeoutError:
                    continue
                if message.type == aiohttp.WSMsgType.TEXT:
                    messages.append(json.loads(message.data))

    thread = threading.Thread(target=lambda: asyncio.run(listen()))
    thread.start()
    assert is_open.wait(30)
    try:
        yield messages
        time.sleep(0.5)
    finally:
        over.set()
        thread.join()


def shown(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """What the node's panel gets, without times and memory."""
    events = [message["data"] for message in messages if message["type"] == "chroma_trainer.event"]
    columns = [event["steps"] for event in events if event["kind"] == "StepReports"]
    steps = {name: [value for part in columns for value in part[name]] for name in ("step", "loss", "learning_rate")}
    kinds = ("PhaseStarted", "PreviewReady", "CheckpointSaved", "LoraSaved", "RunEnded", "RunOpened")
    cached = ("identify", "text", "latents")  # only the first run has these phases
    rest = [
        {name: value for name, value in event.items() if name != "memory"}
        for event in events
        if event["kind"] in kinds and event.get("phase") not in cached
    ]
    texts = {event["text"] for event in events if event["kind"] == "Notice"}
    notices = {text for text in texts if not text.startswith(("plan: ", "peak memory: "))}  # of this moment
    return {
        "steps": steps,
        "events": rest,
        "notices": notices,
        "memory": [e["memory"] for e in events if "memory" in e],
    }


def train(server: Server, workflow: dict[str, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Train, and take away what the run has left: every file, and what the page was shown."""
    name = workflow[TRAINER]["inputs"]["name"]
    with listening(server) as messages:
        server.run(workflow)
    folder, lora = run_folder(server, name), server.output / "loras" / f"{name}.safetensors"
    assert folder
    paths = [path for path in folder.rglob("*") if path.is_file() and not OF_A_MOMENT & {path.name, path.parent.name}]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths} | {"lora": lora.read_bytes()}
    assert not is_held(folder) and children(server) == [], "the memory of the processes is free"
    shutil.rmtree(folder)
    lora.unlink()
    return files, shown(messages)


@pytest.fixture(scope="module")
def in_comfyui(server, prompt) -> tuple[dict[str, bytes], dict[str, Any]]:
    """What a training in ComfyUI's process leaves and shows."""
    files, page = train(server, prompt("own"))
    assert {"request.json", "lora"} <= files.keys() and len(page["steps"]["step"]) == 6
    return files, page


@pytest.mark.parametrize("devices", ["1", "cpu:2"])
def test_files_and_messages_are_those_of_a_run_in_comfyui_s_process(server, prompt, in_comfyui, devices):
    files, page = in_comfyui
    own_files, own_page = train(server, prompt("own", devices=devices))
    assert {name for name in files | own_files if files.get(name) != own_files.get(name)} == set()
    assert own_page["steps"] == page["steps"] and own_page["events"] == page["events"]
    assert page["notices"] <= own_page["notices"]
    assert own_page["memory"] and own_page["memory"][-1]["used"] > 0


def test_headless_writes_the_same_bytes(prompt, in_comfyui, headless, tmp_path):
    (tmp_path / "diffusion_models").mkdir()
    shutil.copy(NANO, tmp_path / "diffusion_models" / "nano.safetensors")
    output = headless(prompt("own"), "--models", str(tmp_path))
    assert (output / "loras" / "own.safetensors").read_bytes() == in_comfyui[0]["lora"]


def test_cancel_and_resume_in_comfyui_s_process(server, prompt):
    prompt_id = server.queue(prompt("canceled", devices="1", **ENDLESS))
    folder, child = training(server, "canceled")
    server.post("/interrupt", {})
    history = server.wait(prompt_id)
    assert any(message[0] == "execution_interrupted" for message in history["status"]["messages"])
    assert not child.is_running() and status_of(folder).state == "stopped" and not is_held(folder)
    assert (server.output / "loras" / "canceled.safetensors").is_file()
    reached = status_of(folder).step
    server.run(prompt("canceled", **{**ENDLESS, "steps": reached + 2}))
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert (report["resumed_from"], report["steps"]) == (reached, reached + 2)


def test_pause_and_resume_by_the_routes_of_the_sidebar(server, prompt):
    workflow = prompt("paused", devices="1", **ENDLESS)
    prompt_id = server.queue(workflow)
    folder, child = training(server, "paused")
    server.post(f"/chroma_trainer/runs/{folder.name}/pause", {})
    history = server.wait(prompt_id)
    assert any(message[0] == "execution_interrupted" for message in history["status"]["messages"])
    assert not child.is_running() and status_of(folder).state == "paused"
    paused = status_of(folder).step
    prompt_id = server.queue(workflow)
    until(lambda: status_of(folder).state == "running" and status_of(folder).step > paused, server)
    server.post(f"/chroma_trainer/runs/{folder.name}/stop", {})
    server.wait(prompt_id)
    assert status_of(folder).state == "stopped" and children(server) == []


def test_an_error_of_the_process_is_shown_as_one_of_comfyui_s(server, prompt):
    """Here the run's folder is in use, which is found after every check of the prompt."""
    texts = {}
    server.run(prompt("refused", **{**ENDLESS, "steps": 4}))
    folder = run_folder(server, "refused")
    assert folder
    with RunLock(folder):
        for devices in ("", "1", "cpu:2"):
            history = server.wait(server.queue(prompt("refused", devices=devices, **{**ENDLESS, "steps": 5})))
            (fault,) = faults_of(history)
            assert (fault["node_id"], fault["exception_type"].rpartition(".")[2]) == (TRAINER, "UserError")
            texts[devices] = fault["exception_message"]
    assert "is using this run folder" in texts[""] and len(set(texts.values())) == 1, texts


@pytest.mark.skipif(sys.platform == "win32", reason="a process is ended by a signal here")
def test_a_process_that_is_killed_is_an_error_of_the_node_and_comfyui_goes_on(server, prompt):
    with listening(server) as messages:
        prompt_id = server.queue(prompt("killed", devices="1", **ENDLESS))
        folder, child = training(server, "killed")
        child.kill()
        history = server.wait(prompt_id)
    (fault,) = faults_of(history)
    assert "it was ended by SIGKILL, which the system also sends when memory is full" in fault["exception_message"]
    assert "Run again to resume from the last checkpoint" in fault["exception_message"]
    end = shown(messages)["events"][-1]
    assert (end["kind"], end["state"]) == ("RunEnded", "failed") and "SIGKILL" in end["message"]
    assert status_of(folder).state == "failed" and "SIGKILL" in status_of(folder).message
    last = max(int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*"))
    server.run(prompt("killed", devices="1", **{**ENDLESS, "steps": last + 2}))
    assert json.loads((folder / "report.json").read_text("utf-8"))["resumed_from"] == last


def test_the_process_saves_and_ends_when_comfyui_does(server, prompt):
    """The last one: it ends the server."""
    server.queue(prompt("orphan", devices="1", **ENDLESS))
    folder, child = training(server, "orphan")
    server.process.terminate()
    server.process.wait(60)
    child.wait(60)
    status = status_of(folder)
    assert status.state == "stopped" and not is_held(folder)
    assert (folder / "checkpoints" / f"step-{status.step:06d}").is_dir()
    assert (server.output / "loras" / "orphan.safetensors").is_file()
