"""What the page may read and ask: the runs under output/chroma_trainer, and nothing else on the disk."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from chroma_trainer.nodes.comfyui.event_history import SCORE_NUMBERS
from chroma_trainer.nodes.comfyui.http_routes import add_routes
from chroma_trainer.nodes.comfyui.routes.requests import same_origin
from chroma_trainer.nodes.comfyui.run_history import NUM_POINTS, Backlog
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.host import Paths, SinkHost
from chroma_trainer.trainer_core.launch.run_queue import RunQueue
from chroma_trainer.trainer_core.runs.control import COMMAND, Status, write_status
from chroma_trainer.trainer_core.runs.local_values import write_launch_values
from chroma_trainer.trainer_core.runs.lock import RunLock

RUN = "cat-12345678"


def step(number: int, loss: float = 0.5) -> dict:
    values = {"total": 9, "loss": loss, "learning_rate": 1e-4, "grad_norm": 0.1, "seconds": 0.01}
    return {"kind": "StepReport", "step": number, **values}


def tell(folder: Path, *events: dict) -> None:
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


@pytest.fixture
def output(tmp_path) -> Path:
    """An output folder with one finished run in it, and a secret beside it."""
    folder = tmp_path / "output" / "chroma_trainer" / RUN
    (folder / "validation").mkdir(parents=True)
    (folder / "validation" / "step-000002-64x64.png").write_bytes(b"png")
    write_status(folder, Status("finished", 3, 3, "save", 0, 1.0))
    workflow = {"12:5": {"class_type": "LoRATrainer", "inputs": {"name": "cat"}}}
    record = {"request": {"training": {"name": "cat", "rank": 4}}, "workflow": workflow}
    (folder / "request.json").write_text(json.dumps(record), "utf-8")
    tell(
        folder,
        {"kind": "PhaseStarted", "phase": "train", "total": 3, "unit": "steps"},
        {"kind": "MemoryPlanned", "device_bytes": 7, "ram_bytes": 9},
        step(1),
        step(2),
        {"kind": "CheckpointSaved", "step": 2, "path": "checkpoints/step-000002"},
        {"kind": "PreviewReady", "step": 2, "path": "validation/step-000002-64x64.png"},
        {"kind": "PreviewReady", "step": 3, "path": "validation/removed.png"},
        step(3, math.nan),
        {"kind": "LoraSaved", "path": "C:\\loras\\cat.safetensors", "sha256": "", "applied": 7, "num_keys": 7},
    )
    (tmp_path / "output" / "secret").mkdir()
    write_status(tmp_path / "output" / "secret", Status("finished"))
    return tmp_path / "output"


def ask(
    output: Path,
    path: str,
    method: str = "GET",
    headers: dict | None = None,
    body: str = "",
    send: Callable[[dict], None] = lambda message: None,
) -> tuple[int, str]:
    """Status and text of one request."""

    async def call() -> tuple[int, str]:
        routes, app = web.RouteTableDef(), web.Application()
        make_host = lambda: SinkHost(Paths(output, output / "cache"))  # noqa: E731
        add_routes(routes, lambda: output, make_host, RunQueue(output), send)
        app.add_routes(routes)
        async with TestClient(TestServer(app)) as client:
            answer = await client.request(method, URL(path, encoded=True), headers=headers or {}, data=body or None)
            return answer.status, await answer.text()

    from yarl import URL

    return asyncio.run(call())


def test_runs_are_listed_with_what_they_were(output):
    status, text = ask(output, "/chroma_trainer/runs")
    (found,) = json.loads(text)["runs"]
    assert status == 200
    assert (found["run"], found["name"], found["node"], found["state"]) == (RUN, "cat", "12:5", "finished")
    assert (found["step"], found["total"], found["alive"]) == (3, 3, False)
    assert "step-000002-64x64.png" in found["picture"]


def test_a_run_of_a_lora_in_a_subfolder_is_listed(output):
    folder = output / "chroma_trainer" / "styles~cat-1a2b3c4d"
    folder.mkdir()
    write_status(folder, Status("finished", 3, 3))
    (folder / "request.json").write_text('{"request": {"training": {"name": "styles/cat"}}, "workflow": {}}', "utf-8")
    (summary,) = [run for run in Backlog(output).runs() if run["run"] == folder.name]
    assert (summary["name"], summary["state"]) == ("styles/cat", "finished")


def test_no_runs_is_an_empty_list(tmp_path):
    assert json.loads(ask(tmp_path / "nowhere", "/chroma_trainer/runs")[1]) == {"runs": [], "queue": []}


def test_the_story_of_a_run(output):
    status, text = ask(output, f"/chroma_trainer/runs/{RUN}")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert status == 200
    assert found["steps"]["step"] == [1, 2, 3] and found["steps"]["loss"] == [0.5, 0.5, None]
    assert found["checkpoints"] == [2] and [p["step"] for p in found["pictures"]] == [2]
    assert found["lora"] == {"lora": "cat.safetensors", "applied": 7, "num_keys": 7}
    assert found["phase"]["phase"] == "train" and found["settings"]["training"]["rank"] == 4
    assert found["plan"] == {"device_bytes": 7, "ram_bytes": 9}
    assert found["prompt"]["12:5"]["class_type"] == "LoRATrainer"


def test_a_page_that_has_steps_gets_the_rest(output):
    found = json.loads(ask(output, f"/chroma_trainer/runs/{RUN}?after=2")[1])
    assert found["steps"]["step"] == [3] and "settings" not in found
    for text in ("-1", "x", "9" * 40, ""):
        assert json.loads(ask(output, f"/chroma_trainer/runs/{RUN}?after={text}")[1])["steps"]["step"] == [1, 2, 3]


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "..%2Fsecret",
        "%2e%2e%2fsecret",
        "..%5Csecret",
        "%2Fetc",
        "C%3A%5CWindows",
        "cat%00",
        ".cache",
        "nowhere",
        "validation",
        "a" * 5000,
        "%FF",
    ],
)
def test_names_that_are_no_run_are_not_found(output, name):
    (output / "chroma_trainer" / ".cache").mkdir()
    write_status(output / "chroma_trainer" / ".cache", Status("finished"))
    for path, method in ((f"/chroma_trainer/runs/{name}", "GET"), (f"/chroma_trainer/runs/{name}/stop", "POST")):
        status, text = ask(output, path, method)
        assert status in (400, 404, 405) and "finished" not in text
    assert not list(output.rglob(COMMAND))


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="links need rights on Windows")
def test_a_link_that_leads_out_is_no_run(output):
    (output / "chroma_trainer" / "link").symlink_to(output / "secret", target_is_directory=True)
    assert ask(output, "/chroma_trainer/runs/link")[0] == 404
    assert [run["run"] for run in json.loads(ask(output, "/chroma_trainer/runs")[1])["runs"]] == [RUN]


def test_a_command_reaches_the_running_job(output):
    folder = output / "chroma_trainer" / RUN
    with RunLock(folder):
        write_status(folder, Status("running", 3, 9, "train", os.getpid()))
        status, text = ask(output, f"/chroma_trainer/runs/{RUN}/pause", "POST")
    assert status == 200 and json.loads(text)["state"] == "running"
    assert json.loads((folder / COMMAND).read_text("utf-8"))["command"] == "pause"


def test_a_command_that_can_not_be_says_why(output):
    status, text = ask(output, f"/chroma_trainer/runs/{RUN}/pause", "POST")
    assert status == 409 and "no process is running" in json.loads(text)["error"]
    assert ask(output, f"/chroma_trainer/runs/{RUN}/delete", "POST")[0] == 404
    assert ask(output, f"/chroma_trainer/runs/{RUN}/stop", "GET")[0] == 405


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),  # no browser
        ({"Host": "a:1", "Origin": "http://a:1"}, True),
        ({"Host": "a:1", "Origin": "http://b:1"}, False),
        ({"Host": "a:1", "Origin": "http://a:2"}, False),
        ({"Host": "a:1", "Origin": "null"}, False),
        ({"Sec-Fetch-Site": "same-origin", "Host": "inner", "Origin": "https://outer"}, True),  # behind a proxy
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "none"}, True),
    ],
)
def test_only_the_own_page_commands(headers, allowed):
    assert same_origin(headers) == allowed


def test_a_foreign_page_is_refused(output):
    folder = output / "chroma_trainer" / RUN
    with RunLock(folder):
        write_status(folder, Status("running", 3, 9, "train", os.getpid()))
        status, _ = ask(output, f"/chroma_trainer/runs/{RUN}/stop", "POST", {"Origin": "http://evil.example"})
    assert status == 403 and not (folder / COMMAND).exists()


def test_the_story_goes_on_where_it_was(output):
    folder = output / "chroma_trainer" / RUN
    backlog = Backlog(output)
    assert backlog.story(folder)["steps"]["step"] == [1, 2, 3]
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'{"kind": "StepRep')  # a line that is being written
    assert backlog.story(folder)["steps"]["step"] == [1, 2, 3]
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'ort"}\n')  # a damaged one
    tell(folder, {"kind": "Resumed", "step": 2}, step(3), step(4))
    found = backlog.story(folder)
    assert found["steps"] == Backlog(output).story(folder)["steps"]
    assert found["steps"]["step"] == [1, 2, 3, 4] and found["steps"]["loss"][2] == 0.5


def test_a_new_start_forgets_the_warnings_of_the_last_one(output):
    folder = output / "chroma_trainer" / RUN
    notice = {"kind": "Notice", "text": "ended at step 3", "level": "warning"}
    tell(folder, notice)
    assert Backlog(output).story(folder)["notices"] == [{"text": "ended at step 3", "level": "warning"}]
    tell(folder, {"kind": "RunOpened", "folder": "."})
    assert Backlog(output).story(folder)["notices"] == []


def test_a_long_curve_is_thinned_to_its_means(output):
    folder = output / "chroma_trainer" / RUN
    tell(folder, {"kind": "Resumed", "step": 0}, *(step(i, i) for i in range(1, 2 * NUM_POINTS + 2)))
    steps = Backlog(output).story(folder)["steps"]
    assert len(steps["step"]) <= NUM_POINTS and steps["step"][-1] == 2 * NUM_POINTS + 1
    assert (steps["step"][0], steps["loss"][0]) == (3, 2.0)
    assert all(len(values) == len(steps["step"]) for values in steps.values())


def test_evaluations_are_in_the_history(output):
    """Each with what it says beside the others; those after a checkpoint that the run went back to are not."""
    report = {"kind": "EvalReport", "loss": 0.5, "standard_error": math.nan, "held_out": True}
    compared = {
        "kind": "EvalCompared", "best": 0, "waiting": 1, "change": 0.1, "change_error": 0.05, "trained": None,
        "sigmas": [0.125], "gap_since": 0, "gaps": [0.2], "gap_errors": [0.1], "overfits": True,
    }  # fmt: skip
    tell(output / "chroma_trainer" / RUN, *({**report, "step": at} for at in (0, 2)), {**compared, "step": 2})
    tell(output / "chroma_trainer" / RUN, {**compared, "step": 3}, {**report, "step": "x"})
    found = json.loads(ask(output, f"/chroma_trainer/runs/{RUN}")[1])["evals"]
    assert found[0] == {"step": 0, "loss": 0.5, "standard_error": None, "held_out": True}
    compared.pop("kind")
    assert found[1:] == [{**found[0], **compared, "step": 2}]
    tell(output / "chroma_trainer" / RUN, {"kind": "Resumed", "step": 1})
    assert len(json.loads(ask(output, f"/chroma_trainer/runs/{RUN}")[1])["evals"]) == 1


def test_what_was_measured_stays_where_a_resumed_run_measures_its_start_again(output):
    report = {"kind": "EvalReport", "loss": 0.5, "standard_error": 0.1, "held_out": True}
    scored = {
        "kind": "ImagesScored",
        "is_shown": True,
        "prompts": ["a"],
        "by_prompt": [20],
        **dict.fromkeys(SCORE_NUMBERS, 1),
    }
    folder = output / "chroma_trainer" / RUN
    tell(
        folder, *({**report, "step": at} for at in (0, 2, 4)), *({**scored, "step": at, "strength": 1} for at in (0, 2))
    )
    tell(folder, {**report, "step": 0}, {**scored, "step": 2, "strength": 0.5}, {**scored, "step": 0, "strength": 1})
    tell(folder, {"kind": "Resumed", "step": 2}, {**scored, "step": 3, "strength": 1, "prompts": None})
    story = Backlog(output).story(folder)
    assert [item["step"] for item in story["evals"]] == [0, 2]
    assert [(item["step"], item["strength"]) for item in story["scores"]] == [(0, 1), (2, 1), (2, 0.5)]
    assert story["scores"][0]["prompts"] == ["a"]


def test_the_queue_is_shown_ordered_and_guarded(output):
    queue = RunQueue(output)
    a, b = (queue.add(name, "5", {"secret": name}, False) for name in "ab")
    listed = json.loads(ask(output, "/chroma_trainer/runs")[1])["queue"]
    assert [(entry["name"], entry["place"]) for entry in listed] == [("a", 1), ("b", 2)] and "secret" not in str(listed)
    status, text = ask(output, f"/chroma_trainer/queue/{b.id}/up", "POST")
    assert status == 200 and [entry["name"] for entry in json.loads(text)["queue"]] == ["b", "a"]
    sent: list = []
    assert ask(output, f"/chroma_trainer/queue/{a.id}/remove", "POST", send=sent.append)[0] == 200
    (message,) = sent
    assert (message["kind"], message["state"], message["node"], message["name"]) == ("RunEnded", "removed", "5", "a")
    status, text = ask(output, f"/chroma_trainer/queue/{a.id}/remove", "POST")
    assert status == 409 and "has left the queue" in json.loads(text)["error"]
    assert ask(output, f"/chroma_trainer/queue/{b.id}/pause", "POST")[0] == 404
    elsewhere = {"Origin": "http://evil.example"}
    assert ask(output, f"/chroma_trainer/queue/{b.id}/remove", "POST", elsewhere)[0] == 403
    assert ask(output, "/chroma_trainer/queue/..%2f..%2fsecret/remove", "POST")[0] in (404, 409)
    assert [entry.name for entry in queue.entries()] == ["b"]


def test_a_run_is_resumed_as_it_was_started(output):
    folder = output / "chroma_trainer" / RUN
    write_launch_values(folder, TrainingConfig(background=True, detached=True, devices="1"))
    prompt = json.loads(ask(output, f"/chroma_trainer/runs/{RUN}")[1])["prompt"]
    assert prompt["12:5"]["inputs"] == {"name": "cat", "background": True, "detached": True, "devices": "1"}
    (folder / "launch.json").write_text('{"background": "yes", "devices": 1, "detached": true}', "utf-8")
    prompt = json.loads(ask(output, f"/chroma_trainer/runs/{RUN}")[1])["prompt"]
    assert prompt["12:5"]["inputs"] == {"name": "cat", "detached": True}  # what is damaged is left out
    write_launch_values(folder, TrainingConfig())
    assert not (folder / "launch.json").exists()


def test_unfolding_a_quick_lora(output):
    status, text = ask(output, "/chroma_trainer/unfold", "POST", body='{"quality": "quick"}')
    types = [node["type"] for node in json.loads(text)["workflow"]["nodes"]]
    assert status == 200 and types.count("LoRATrainer") == 1
    status, text = ask(output, "/chroma_trainer/unfold", "POST", body='{"images": "nowhere-at-all", "rank": 3}')
    assert status == 409 and "rank" in json.loads(text)["error"]
    for body in ("", "[]", "{", "\udcff".encode("utf-8", "surrogatepass").decode("latin-1")):
        assert ask(output, "/chroma_trainer/unfold", "POST", body=body)[0] == 400
    foreign = {"Origin": "https://elsewhere.example"}
    assert ask(output, "/chroma_trainer/unfold", "POST", foreign, '{"quality": "quick"}')[0] == 403


def test_importing_dropped_files(output):
    job = "job: extension\nconfig:\n  process:\n  - model: {arch: chroma, name_or_path: lodestones/Chroma1-HD}\n"
    datasets = "    datasets: [{folder_path: /data/cats}]\n"

    def send(*files: object, headers: dict | None = None) -> tuple[int, str]:
        return ask(output, "/chroma_trainer/import", "POST", headers, json.dumps({"files": files}))

    status, text = send({"name": "job.yaml", "text": job + datasets})
    answer = json.loads(text)
    assert (
        status == 200 and answer["trainer"] == "ai-toolkit" and set(answer["report"]) == {"taken", "equal", "missing"}
    )
    assert any(node["type"] == "LoadChroma" for node in answer["workflow"]["nodes"])
    assert send({"name": "workflow.json", "text": '{"nodes": []}'}) == (200, "null")
    status, text = send({"name": "job.yaml", "text": job + "    datasets: []\n"})
    assert status == 409 and "names no folder of images" in json.loads(text)["error"]
    assert ask(output, "/chroma_trainer/import", "POST", body='{"files": 3}')[0] == 400
    assert send(headers={"Origin": "https://elsewhere.example"})[0] == 403
