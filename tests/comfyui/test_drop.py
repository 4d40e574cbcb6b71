"""Files dropped on ComfyUI's page: its own workflows open as ever, another trainer's configuration is imported, with its report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.workflow.read import graph_from_json, to_api

from tests.importers import examples
from tests.importers.test_dropped_files import drop

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]
WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "first-lora.json"


def inputs_by_type(prompt: dict) -> dict:
    return {node["class_type"]: node["inputs"] for node in prompt.values()}


def test_dropped_files(each_page, tmp_path):
    config = {
        "config.json": examples.FLUX_GUIDE,
        "multidatabackend.json": examples.BACKENDS,
        "user_prompt_library.json": examples.LIBRARY,
    }
    for name, content in config.items():
        (tmp_path / name).write_text(json.dumps(content), "utf-8")
    shutil.copy(WORKFLOW, tmp_path)
    (tmp_path / "job.yaml").write_text("config: [\n", "utf-8")
    seen = each_page("drop", tmp_path, tmp_path / "seen.json")

    own = [node["type"] for node in json.loads(WORKFLOW.read_text("utf-8"))["nodes"]]
    assert sorted(seen["own"]["types"]) == sorted(own) and seen["own"]["dialogs"] == []
    expected = drop(config)
    assert expected
    read = inputs_by_type(to_api(graph_from_json(expected["workflow"], schemas())))
    assert inputs_by_type(seen["imported"]["prompt"]) == read
    (report,) = seen["imported"]["dialogs"]
    assert "Imported from SimpleTuner" in report and seen["imported"]["focus"] == "Close"
    for lines in expected["report"].values():
        assert f"({len(lines)})" in report and all(line["text"] in report for line in lines)
    assert seen["closed"]["dialogs"] == [] and seen["closed"]["types"] == seen["imported"]["types"]
    (failure,) = seen["failed"]["dialogs"]
    assert "job.yaml: is not valid YAML" in failure and seen["failed"]["types"] == seen["imported"]["types"]
