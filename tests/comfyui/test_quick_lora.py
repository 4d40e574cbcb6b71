"""QuickLora in ComfyUI: the button opens the graph that the node runs, and the node runs it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.nodes.wizard import quick_lora
from chroma_trainer.trainer_core.host import Paths, SinkHost
from chroma_trainer.trainer_core.workflow.read import graph_from_json, to_api

pytestmark = pytest.mark.comfyui
WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "quick-lora.json"
SECONDS = 240


def of_ours(prompt: dict) -> dict:
    """The nodes of a prompt by type, without titles."""
    return {node["class_type"]: node["inputs"] for node in prompt.values()}


@pytest.mark.browser
def test_the_button_opens_the_full_graph(each_page, tmp_path):
    seen = each_page("unfold", WORKFLOW, tmp_path / "unfold.json")
    assert seen["error"], "a wrong folder is not told on the page"
    host = SinkHost(Paths(tmp_path / "output", tmp_path / "cache"))
    unfolded = quick_lora.unfold({"quality": "quick"}, host)
    assert of_ours(seen["prompt"]) == of_ours(to_api(graph_from_json(unfolded, schemas())))
    assert any(node["type"] == "MarkdownNote" for node in seen["workflow"]["nodes"])


def test_its_run_is_shown_at_the_node_and_recorded_as_the_full_graph(comfyui):
    node = {"class_type": "QuickLora", "inputs": {"quality": "quick", "name": "quick-in-comfyui"}}
    prompt_id = comfyui.queue({"7": node})
    runs = comfyui.output / "chroma_trainer"
    until = time.monotonic() + SECONDS
    while not list(runs.glob("quick-in-comfyui-*/checkpoints/step-*")):
        assert time.monotonic() < until, comfyui.log[-3000:]
        time.sleep(0.2)
    comfyui.post("/interrupt", {})
    comfyui.wait(prompt_id)
    (folder,) = runs.glob("quick-in-comfyui-*")
    recorded = json.loads((folder / "request.json").read_text("utf-8"))["workflow"]
    assert {node["class_type"] for node in recorded.values()} >= {"LoadChroma", "DatasetBackend", "LoRATrainer"}
    assert (comfyui.output / "loras" / "quick-in-comfyui.safetensors").is_file()


def test_a_wrong_choice_is_shown_before_the_run(comfyui):
    """ComfyUI reports what its own lists do not hold; the rest is ours, at the node."""
    node = {"class_type": "QuickLora", "inputs": {"model": "nano", "images": "nowhere-at-all", "name": "a:b"}}
    with pytest.raises(Exception, match="nowhere-at-all") as caught:
        comfyui.queue({"7": node})
    assert "a:b" in str(caught.value)
