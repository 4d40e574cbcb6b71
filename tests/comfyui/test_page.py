"""The pack on ComfyUI's real page: shipped workflows load there, and are read headless as the page reads them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.spec import fields_of
from chroma_trainer.trainer_core.workflow.read import read_workflow, to_api

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]
WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"


NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))


@pytest.fixture(scope="module")
def prompts(page, tmp_path_factory) -> dict:
    """What the page would send for each shipped workflow."""
    return page("prompts", WORKFLOWS, tmp_path_factory.mktemp("prompts") / "prompts.json")


@pytest.mark.parametrize("name", NAMES)
def test_page_and_reader_agree_on_a_shipped_workflow(prompts, name):
    found = prompts[name]["prompt"]
    assert json.loads((WORKFLOWS / "api" / f"{name}.json").read_text("utf-8")) == found
    read = to_api(read_workflow(WORKFLOWS / f"{name}.json", schemas()))
    for node in (*found.values(), *read.values()):
        if node["class_type"] not in schemas():
            del node["_meta"]  # its title, which ComfyUI alone knows
    assert read == found


def apart(a: list[int], b: list[int]) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize("kind", ["classic", "vue"])
def test_nodes_of_the_shipped_workflows_lie_apart(page, tmp_path, kind):
    """As nodes on the canvas and as Nodes 2.0, which are taller; each is in one group or in none, also while a run is shown."""
    page.server.post("/settings/Comfy.VueNodes.Enabled", kind == "vue")
    try:
        found = page("allBoxes", WORKFLOWS, tmp_path / "boxes.json")
    finally:
        page.server.post("/settings/Comfy.VueNodes.Enabled", False)
    assert sorted(found) == NAMES
    for name, boxes, groups in ((name, page["boxes"], page["groups"]) for name, page in found.items()):
        assert len(boxes) == len(json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8"))["nodes"])
        for (one, a), (two, b) in combinations(boxes.items(), 2):
            assert apart(a, b), (name, one, a, two, b)
        for (node, a), (title, b) in product(boxes.items(), groups.items()):
            assert apart(a, b) or (b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]), (name, node, title)


@pytest.mark.parametrize("kind", ["classic", "vue"])
def test_the_first_workflow_opens_readable(page, tmp_path, kind):
    """ComfyUI leaves texts out below a zoom of about 60 %."""
    page.server.post("/settings/Comfy.VueNodes.Enabled", kind == "vue")
    try:
        with_window = replace(page, window="1600x1000")
        assert with_window("boxes", WORKFLOWS / "first-lora.json", tmp_path / "boxes.json")["scale"] >= 0.65
    finally:
        page.server.post("/settings/Comfy.VueNodes.Enabled", False)


def test_connections_have_colours_by_type(each_page, tmp_path):
    """The page's palette empties those of packs when it loads."""
    found = each_page("colours", WORKFLOWS / "low-vram.json", tmp_path / "colours.json")
    ours = {kind: seen for kind, seen in found.items() if kind.startswith("TRAIN_")}
    assert len(ours) == 3 and len({seen[0] for seen in ours.values()}) == 3
    for link, slot, css in ours.values():
        assert link and link == slot
        assert css in (link, "")  # front end 1.35.9 has no such names; ours are set all the same


def test_fields_that_few_runs_need_are_folded_away(each_page, tmp_path):
    """All but those that are not as they were; the button changes what is seen, not what is sent or saved."""
    workflow = json.loads((WORKFLOWS / "first-lora.json").read_text("utf-8"))
    trainer = next(node for node in workflow["nodes"] if node["type"] == "LoRATrainer")
    fields = [field for field in fields_of(TrainingConfig) if field.is_widget]
    values = [field.name for field in fields if not field.seed]
    place = [field.name for field in fields].index("max_grad_norm")
    trainer["widgets_values"][place] = 0.5
    (tmp_path / "changed.json").write_text(json.dumps(workflow), "utf-8")
    found = each_page("fold", tmp_path / "changed.json", tmp_path / "fold.json")
    few = {field.name for field in fields if field.advanced} - {"max_grad_norm"}
    assert few.isdisjoint(found["folded"]["names"]) and "max_grad_norm" in found["folded"]["names"]
    assert set(values) <= set(found["open"]["names"]) and found["open"]["height"] > found["folded"][
        "height"
    ] + 10 * len(few)
    assert found["again"] == found["folded"] and found["same"]


def test_a_new_node_keeps_its_seed(each_page, tmp_path):
    """Else Run after Cancel would train something else than before, and not go on."""
    for values in each_page("added", WORKFLOWS / "quick-lora.json", tmp_path / "added.json").values():
        assert values["control_after_generate"] == "fixed"


def test_a_rejected_run_says_why(each_page, short_workflow, tmp_path):
    """ComfyUI 0.33 itself says that LoRA Trainer rejected the value for name, whichever field is wrong."""
    workflow = short_workflow("rejected", warmup_steps=2000)
    (tmp_path / "wrong.json").write_text(json.dumps(workflow), "utf-8")
    shown = each_page("rejected", tmp_path / "wrong.json", tmp_path / "rejected.json")
    assert shown.count("warmup_steps: ") == 1 and "2000" in shown.partition("warmup_steps: ")[2][:200]


def test_run_on_the_page(page, tmp_path):
    """Run trains, events arrive at the page, and the end is a success."""
    workflow = json.loads((WORKFLOWS / "first-lora.json").read_text("utf-8"))
    for node in workflow["nodes"]:
        if node["type"] == "LoRATrainer":
            node["widgets_values"][0] = "on-the-page"
            node["widgets_values"][5] = 4  # steps
            node["widgets_values"][11] = 1  # warmup_steps
        if node["type"] == "ValidateSampler":
            node["widgets_values"][0:4] = ["cat face", "", 2, 1.0]
    (tmp_path / "short.json").write_text(json.dumps(workflow), "utf-8")
    found = page("run", tmp_path / "short.json", tmp_path / "run.json")
    assert found["end"] == "execution_success", found["detail"]
    assert found["events"] >= 4
    assert (page.server.output / "loras" / "on-the-page.safetensors").is_file()
