"""The pack in a real ComfyUI, the oldest supported and a current one: its nodes, and its manners."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from chroma_trainer.nodes import ALL_NODES

from tests.scripts import load_script

pytestmark = pytest.mark.comfyui
PROJECT = Path(__file__).resolve().parents[2]
NODE_IDS = tuple(ALL_NODES)
OURS = {"diffusers", "peft", "optimum", "accelerate"}  # of what we depend on, these are not ComfyUI's as well
HEAVY = {*OURS, "torch", "torchvision", "transformers", "numpy", "PIL", "safetensors"}


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_node_is_listed_with_its_fields(each_comfyui, node_id):
    spec = ALL_NODES[node_id]
    info = each_comfyui.get(f"/object_info/{node_id}")[node_id]
    offered = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    assert set(offered) == {field.name for field in spec.fields()}
    for field in spec.fields():
        kind, options = offered[field.name]
        assert options["tooltip"] == field.doc
        assert not field.is_widget or options["default"] == field.initial
        if field.range:
            found = options["min"], options["max"], options["step"]
            assert found == (field.range.low, field.range.high, field.range.step)
            assert kind == {int: "INT", float: "FLOAT"}[field.kind]
        if field.choice:
            assert (options["options"] if kind == "COMBO" else kind) == list(field.choice.options)
        if field.socket:
            assert kind == field.socket.type
    assert [n for n in offered if n in _widgets(node_id)] == _widgets(node_id)  # their order is that of saved workflows
    assert info["output"] == [output.type for output in spec.outputs]
    assert info["display_name"] == spec.title


def _widgets(node_id: str) -> list[str]:
    return [field.name for field in ALL_NODES[node_id].fields() if field.is_widget]


def test_the_page_gets_help_and_templates(each_comfyui):
    assert "IMPORT FAILED" not in each_comfyui.whole_log
    for node_id in NODE_IDS:
        page = each_comfyui.get_text(f"/extensions/chroma-trainer/docs/{node_id}.md")
        assert ALL_NODES[node_id].title in page
    names = {path.stem for path in (PROJECT / "workflows").glob("*.json")}
    assert set(each_comfyui.get("/api/workflow_templates")["chroma-trainer"]) == names
    for name in names:
        assert each_comfyui.get(f"/api/workflow_templates/chroma-trainer/{name}.json")["nodes"]


def test_loading_the_pack_imports_nothing_heavy(each_comfyui):
    """Beside ComfyUI itself, in a process that has loaded nothing else."""
    found = import_time().measure(each_comfyui.root, repeats=0)
    assert {name.split(".")[0] for name in found["modules"]} & HEAVY == set()
    assert set(found["present"]) & OURS == set()


def import_time() -> ModuleType:
    return load_script("benchmarks/import_time.py")


def test_all_faults_of_a_graph_show_on_their_nodes_at_once(each_comfyui, short_prompt):
    """Before the first node runs, in one answer: what ComfyUI finds itself, and what a check of the graph finds."""
    prompt = short_prompt("faults", rank=0, learning_rate=0.0)
    prompt["3"]["inputs"]["folder"] = "no-such-folder"
    for node in prompt.values():
        if node["class_type"] == "ValidateSampler":
            node["inputs"]["prompts"] = ""
    with pytest.raises(AssertionError) as refused:
        each_comfyui.queue(prompt)
    answer = json.loads(str(refused.value))
    details = {
        (error["class_type"], item["details"]) for error in answer["node_errors"].values() for item in error["errors"]
    }
    starts = {
        "DatasetBackend": {"folder - 'no-such-folder' is not a folder in ("},
        "LoRATrainer": {"rank", "name - learning_rate: is 0, so nothing would be trained; "},
        "ValidateSampler": {"prompts - is empty; write one prompt per line"},
    }
    assert {kind for kind, _ in details} == set(starts)
    for kind, detail in details:
        assert any(detail.startswith(start) for start in starts[kind]), (kind, detail)
    assert len({(kind, detail.split(" - ")[0]) for kind, detail in details}) == 4


def test_a_value_out_of_range_never_runs(each_comfyui, short_prompt):
    """ComfyUI runs the outputs that are sound, and names the one that is not."""
    answer = each_comfyui.post("/prompt", {"prompt": short_prompt("out-of-range", rank=0), "client_id": "test"})
    errors = [error for node in answer["node_errors"].values() for error in node["errors"]]
    assert {error["type"] for error in errors} == {"value_smaller_than_min"}
    assert {error["extra_info"]["input_name"] for error in errors} == {"rank"}
    each_comfyui.wait(answer["prompt_id"])
    assert not (each_comfyui.output / "loras" / "out-of-range.safetensors").exists()


def test_an_older_export_lacks_newer_fields_and_still_runs(each_comfyui, short_prompt):
    prompt = short_prompt("older-export", validate_every=0)
    for node in prompt.values():
        if node["class_type"] in ("LoRATrainer", "DatasetBackend"):
            for name in ("seed", "on_change", "holdout", "bucket_step", "on_broken"):
                node["inputs"].pop(name, None)
    each_comfyui.run(prompt)
    assert (each_comfyui.output / "loras" / "older-export.safetensors").is_file()
