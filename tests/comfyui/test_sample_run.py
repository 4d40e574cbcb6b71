"""SampleRun in ComfyUI: prompts typed in the sidebar are sampled with the weights of a run that has ended."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.comfyui
NAME = "to-be-sampled"


def test_prompts_are_sampled_and_listed_with_the_run(comfyui, short_prompt):
    comfyui.run(short_prompt(NAME))
    listed = comfyui.get("/chroma_trainer/runs")["runs"]
    (run,) = [entry["run"] for entry in listed if entry["name"] == NAME]
    folder = comfyui.output / "chroma_trainer" / run
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    comfyui.run({"1": {"class_type": "SampleRun", "inputs": {"run": run, "prompts": "cat face\nsun"}}})
    new = {path for path in folder.rglob("*") if path.is_file()} - before.keys()
    assert new and all(path.suffix == ".png" for path in new)
    assert all(path.read_bytes() == content for path, content in before.items()), "the run's own files are as they were"
    story = comfyui.get(f"/chroma_trainer/runs/{run}")
    assert len(story["drawn"]) == len(new) and all("/view?" in drawn["url"] for drawn in story["drawn"])
