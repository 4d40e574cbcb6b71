"""The pack beside others on one server: its routes, its memory, and a queue of trainings."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest
from chroma_trainer.trainer_core.runs.control import read_status

pytestmark = pytest.mark.comfyui
CONFIG = '{"in_channels": 4, "joint_attention_dim": 32, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": [4, 6, 6], "approximator_num_channels": 64, "approximator_hidden_dim": 16, "approximator_layers": 1}'


def test_models_of_comfyui_make_room_before_training(comfyui, short_prompt):
    hold = {"class_type": "ProbeHold", "inputs": {"model": ["chroma", 0]}}
    chroma = {"class_type": "ProbeChroma", "inputs": {"config": CONFIG}}
    history = comfyui.run({"chroma": chroma, "hold": hold})
    assert history["outputs"]["hold"]["loaded"] == [1]
    prompt = short_prompt("makes-room", steps=3)
    prompt["loaded"] = {"class_type": "ProbeLoaded", "inputs": {"after": ["5", 3]}}
    assert comfyui.run(prompt)["outputs"]["loaded"]["loaded"] == [0]


def test_a_queue_of_three_trainings(comfyui, short_prompt):
    names = ["queue-1", "queue-2", "queue-3"]
    waiting = [comfyui.queue(short_prompt(name, steps=3)) for name in names]
    histories = [comfyui.wait(prompt_id) for prompt_id in waiting]
    assert [history["status"]["status_str"] for history in histories] == ["success"] * 3
    listed = {run["name"]: run for run in comfyui.get("/chroma_trainer/runs")["runs"]}
    for name, history in zip(names, histories, strict=True):
        (run,) = history["outputs"]["5"]["chroma_trainer_run"]
        assert listed[name]["run"] == run and (listed[name]["state"], listed[name]["step"]) == ("finished", 3)
        assert comfyui.get(f"/chroma_trainer/runs/{run}")["steps"]["step"] == [1, 2, 3]
        status = read_status(comfyui.output / "chroma_trainer" / run)
        assert status and status.pid == 0


@pytest.mark.parametrize("path", ["..", "..%2F..%2Fuser", "%2e%2e", "..%5C..", "%2Fetc", ".cache", "validation"])
def test_no_route_leads_out_of_the_runs(comfyui, path):
    for prefix in ("", "/api"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            comfyui.get_text(f"{prefix}/chroma_trainer/runs/{path}")
        assert caught.value.code in (400, 403, 404)


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
def test_a_foreign_page_commands_nothing(each_comfyui, headers):
    request = urllib.request.Request(f"{each_comfyui.url}/chroma_trainer/runs/x/stop", b"", headers, method="POST")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    assert caught.value.code == 403
