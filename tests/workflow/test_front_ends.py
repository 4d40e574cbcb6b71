"""Workflows saved by real front ends read as the prompt that the page itself makes of them (tests/fixtures/workflows)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.workflow.graph import Schema, Widget
from chroma_trainer.trainer_core.workflow.read import read_workflow, to_api

FIXTURES = Path(__file__).parent.parent / "fixtures" / "workflows"
CASES = sorted(path for path in FIXTURES.rglob("*.json") if not path.name.endswith(".api.json"))
FOREIGN = {
    "CheckpointLoaderSimple": ("ckpt_name",),
    "CLIPTextEncode": ("text",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "KSampler": ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "VAEDecode": (),
}
OPTIMIZER = Widget(
    "optimizer",
    options={"adamw": (Widget("optimizer.lr"), Widget("optimizer.decay")), "sgd": (Widget("optimizer.momentum"),)},
)


def all_schemas() -> dict[str, Schema]:
    """Ours, and those of the foreign nodes in the fixtures."""
    foreign = {
        name: Schema(tuple(Widget(widget, control=widget == "seed") for widget in widgets))
        for name, widgets in FOREIGN.items()
    }
    return {**schemas(), **foreign, "Optimizer": Schema((OPTIMIZER, Widget("after")))}


def comparable(prompt: dict, expected: dict) -> dict:
    """Without titles of foreign nodes, which the page translates, and fields of ours that came later, at their defaults."""
    known = {
        (spec.id, field.name): field.default
        for spec in CATALOGUE.values()
        for field in spec.fields()
        if field.is_widget
    }
    result = {}
    for node_id, node in prompt.items():
        kind, inputs = node["class_type"], node["inputs"]
        was = expected.get(node_id, {}).get("inputs", {})
        kept = {n: v for n, v in inputs.items() if n in was or (kind, n) not in known or v != known[kind, n]}
        title = node["_meta"]["title"] if kind in CATALOGUE else ""
        result[node_id] = {"class_type": kind, "inputs": kept, "title": title}
    return result


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_same_prompt_as_the_page(path: Path):
    expected = json.loads(path.with_suffix(".api.json").read_text("utf-8"))
    found = to_api(read_workflow(path, all_schemas()))
    assert comparable(found, expected) == comparable(expected, expected)


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_prompt_reads_back_as_itself(path: Path):
    expected = json.loads(path.with_suffix(".api.json").read_text("utf-8"))
    assert to_api(read_workflow(path.with_suffix(".api.json"), schemas())) == expected


@pytest.mark.parametrize("version", ["1.35.9", "1.58.1"])
def test_foreign_values_are_named_by_what_the_file_says(version: str):
    """Without a schema of theirs, foreign nodes keep their values where the file names each of them."""
    path = FIXTURES / version / "foreign.json"
    expected = json.loads(path.with_suffix(".api.json").read_text("utf-8"))
    found = to_api(read_workflow(path, schemas()))
    for node_id, node in expected.items():
        ours = node["class_type"] in CATALOGUE  # which may have grown since the file was saved
        inputs = found[node_id]["inputs"]
        assert {n: inputs[n] for n in (node["inputs"] if ours else inputs)} == node["inputs"], node["class_type"]


def test_the_foreign_node_without_names_keeps_its_links():
    """Front ends before 1.49 leave names out of what they put into pictures: then there are links and no guesses."""
    graph = read_workflow(FIXTURES / "1.35.9-embedded" / "widget-links.json", schemas())
    assert to_api(graph)["16"]["inputs"] == {"model": ["17", 0], "clip": ["17", 1], "lora_name": ["5", 3]}
