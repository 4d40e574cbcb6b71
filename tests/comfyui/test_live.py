"""The live panel of LoRATrainer, on the real page: it follows a run, survives a reload and a second tab, and changes no export."""

from __future__ import annotations

import pytest
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.runs.control import read_status
from chroma_trainer.trainer_core.storage.atomic import sha256_of
from chroma_trainer.trainer_core.workflow.read import graph_from_json, to_api

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]
FIELDS = {"lr_schedule": "constant", "warmup_steps": 0}


@pytest.fixture(scope="module")
def life(page, short_workflow):
    """One run from its first step over a cancel and a reload to its end, as two tabs saw it."""
    workflow = short_workflow("life", steps=4000, **FIELDS)
    return workflow, page.live("life", workflow)


def trainer(workflow: dict) -> dict:
    return next(node for node in workflow["nodes"] if node["type"] == "LoRATrainer")


def test_the_page_ran_without_a_fault(life):
    assert life[1]["faults"] == []


def test_the_panel_waits_for_a_run(life):
    assert (life[1]["idle"]["state"], life[1]["idle"]["points"]) == ("", "0")


def test_the_curve_moves_while_it_trains(life):
    seen = life[1]
    assert seen["first"]["state"] == "running" and seen["first"]["total"] == "4000"
    assert seen["first"]["run"].startswith("life-")
    assert int(seen["moved"]["points"]) > int(seen["first"]["points"]) >= 3
    assert int(seen["moved"]["pictures"]) >= 1 and int(seen["moved"]["checkpoints"]) >= 1
    assert seen["hover"].startswith("step ") and "loss 0" in seen["hover"].replace("loss 1", "loss 0")


def test_a_second_tab_sees_all_of_it(life):
    seen = life[1]
    assert seen["second"]["run"] == seen["first"]["run"]
    assert int(seen["second"]["points"]) == int(seen["second"]["step"]) > int(seen["moved"]["points"])
    assert seen["secondCancelled"]["points"] == seen["cancelled"]["points"]


def test_a_cancel_shows_and_a_reload_fills_the_curve_again(life):
    seen = life[1]
    assert seen["cancelled"]["state"] == seen["reloaded"]["state"] == "stopped"
    assert seen["reloaded"]["points"] == seen["reloaded"]["step"] == seen["cancelled"]["points"]
    assert int(seen["reloaded"]["checkpoints"]) >= int(seen["cancelled"]["checkpoints"]) >= 1


def test_it_goes_on_from_there(life):
    seen = life[1]
    assert int(seen["resumed"]["points"]) == int(seen["reloaded"]["points"]) + 5 == int(seen["resumed"]["total"])
    assert seen["resumed"]["run"] == seen["first"]["run"]


def test_a_graph_from_a_prompt_shows_its_run(life):
    """ComfyUI opens a LoRA or an image that holds only a prompt without configuring the nodes."""
    seen = life[1]
    assert (seen["fromPrompt"]["run"], seen["fromPrompt"]["points"]) == (
        seen["resumed"]["run"],
        seen["resumed"]["points"],
    )


def test_a_cached_node_fills_its_panel(life):
    seen = life[1]
    assert seen["emptied"]["points"] == "0"
    assert seen["cached"]["points"] == seen["resumed"]["points"]


def test_the_export_is_as_if_there_were_no_panel(life):
    workflow, seen = life
    saved = trainer(seen["page"]["workflow"])["widgets_values"]
    given = trainer(workflow)["widgets_values"]
    assert saved[: len(given)] == given and None not in saved
    assert "live" not in str(seen["page"]["prompt"])
    assert to_api(graph_from_json(workflow, schemas())) == seen["page"]["prompt"]


def test_what_the_page_trained_is_what_the_headless_run_of_its_export_trains(life, page, headless):
    lora = page.server.output / "loras" / "life.safetensors"
    assert sha256_of(lora) == sha256_of(headless(life[1]["ran"]) / "loras" / lora.name)


def test_vue_nodes(life, page, short_workflow):
    """Nodes 2.0: the panel is filled, has its place, follows a run, and the export is the same."""
    before = life[1]
    steps = int(before["resumed"]["points"])
    seen = page.live("vue", short_workflow("life", steps=steps, **FIELDS))
    assert seen["faults"] == [] and seen["filled"]["points"] == before["resumed"]["points"]
    assert seen["box"]["width"] > 200 and seen["box"]["height"] > 100
    classic = trainer(before["page"]["workflow"])["widgets_values"]
    assert trainer(seen["page"]["workflow"])["widgets_values"] == [*classic[:5], steps, *classic[6:]]
    assert seen["ran"]["points"] == "8"


def test_a_trainer_in_a_subgraph(page, short_workflow):
    seen = page.live("subgraph", short_workflow("inside"))
    assert seen["faults"] == [] and any(":" in name for name in seen["ids"])
    assert (seen["ran"]["points"], seen["ran"]["state"]) == ("8", "finished")
    assert (seen["outside"]["points"], seen["outside"]["run"]) == ("8", seen["ran"]["run"])
    assert not any("live" in saved for saved in seen["saved"])


@pytest.mark.parametrize("devices", ["", "1"])
def test_pause_resume_and_stop_from_the_sidebar(page, short_workflow, devices):
    """In ComfyUI's process, and in one of its own."""
    name = f"by-sidebar{devices}"
    seen = page.live("sidebar", short_workflow(name, steps=4000, devices=devices, **FIELDS), name)
    assert seen["faults"] == []
    assert seen["card"]["run"] == seen["stopped"]["run"] and seen["card"]["run"].startswith(f"{name}-")
    assert seen["reached"] > seen["paused"] >= 3
    assert int(seen["node"]["points"]) == seen["paused"]  # the node's panel shows the same
    assert "by-sidebar" in seen["settings"] and seen["pictures"] >= 1 and int(seen["list"]["count"]) >= 1
    status = read_status(page.server.output / "chroma_trainer" / seen["card"]["run"])
    assert status and (status.state, status.step) == ("stopped", seen["reached"])


def test_the_oldest_comfyui(oldest_page, short_workflow):
    """The oldest front end that is supported: follows, exports, is refilled."""
    seen = oldest_page.live("life", short_workflow("life", steps=4000, **FIELDS), "life-oldest")
    assert seen["faults"] == [] and int(seen["moved"]["points"]) > int(seen["first"]["points"])
    assert seen["reloaded"]["points"] == seen["cancelled"]["points"] == seen["secondCancelled"]["points"]
    assert seen["cached"]["points"] == seen["resumed"]["points"]
