"""A sweep, CLIP scores and the sliders of strengths and checkpoints on the real page, with one small sweep for all."""

from __future__ import annotations

import json
import shutil

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]


def test_a_sweep_shows_how_its_runs_compare(page, short_workflow, tiny_clip):
    shutil.copytree(tiny_clip, page.server.base / "models" / "clip_vision" / "tiny-clip")
    fields = {"steps": 4, "validate_every": 2, "checkpoint_every": 2, "holdout": 0.2, "eval_images": 4}
    seen = page.live("sweep", short_workflow("swept", **fields, lr_schedule="constant", warmup_steps=0), "sweep")
    assert seen["faults"] == []
    assert "no node of the workflow has a field 'no_such_field'" in seen["refused"]
    assert seen["node"]["rows"] == 4 and seen["node"]["best"] == 1 and seen["node"]["grid"] == 4
    assert "CLIP score" in seen["node"]["facts"] and "likeness" in seen["node"]["facts"]
    assert seen["side"]["rows"] == 4 and seen["side"]["links"] == 3 and seen["side"]["prompts"] == ["cat face"]
    assert (seen["slider"]["steps"], seen["slider"]["nearest"]) == ("2", "1")
    table = json.loads((page.server.output / "sweeps" / "swept" / "table.json").read_text("utf-8"))
    assert len(table["runs"]) == 4 and all(row["leak"] for row in table["runs"])
    assert list((page.server.output / "loras").glob("swept~*-step-2-strength-1.safetensors"))
