"""A LoRA that was trained from another one names it, and those before it, by their digests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.storage.atomic import sha256_of
from chroma_trainer.trainer_core.train.results.parents import parents_of
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.workflow.lora_metadata import describe
from safetensors.torch import save_file
from torch import ones


def from_file(workshop, path):
    request = workshop.request(steps=2, checkpoint_every=0, eval_images=0)
    return replace(request, adapter=AdapterConfig(init_lora=str(path))) if path else request


@pytest.mark.slow
def test_two_generations(workshop):
    first = Path(run(from_file(workshop, None), workshop.host()).lora.path)
    assert "parents" not in describe(first)
    second = Path(run(from_file(workshop, first), workshop.host()).lora.path)
    third = Path(run(from_file(workshop, second), workshop.host()).lora.path)
    (parent,) = describe(third)["parents"]
    elder = {"name": first.name, "sha256": sha256_of(first), "step": 2}
    assert parent == {"name": second.name, "sha256": sha256_of(second), "step": 2, "parents": [elder]}
    text = describe(third).text()
    assert f"  from      {second.name}, 2 steps (sha256 {sha256_of(second)[:16]})\n" in text
    assert f"    from      {first.name}, 2 steps (sha256 {sha256_of(first)[:16]})\n" in text


@pytest.fixture
def named(workshop, tmp_path):
    """named(metadata) are the parents of a run that starts from a file with this metadata."""

    def parents(metadata):
        save_file({"x": ones(1)}, tmp_path / "start.safetensors", metadata)
        (own,) = parents_of(from_file(workshop, tmp_path / "start.safetensors"))
        assert own.pop("name") == "start.safetensors" and len(own.pop("sha256")) == 64
        return own

    return parents


def test_a_file_that_a_tool_made_has_its_parents(named):
    edit = {"operation": "lora merge", "parents": [{"name": "a", "sha256": "1", "chroma_trainer": {}}, {"name": "b"}]}
    assert named({"chroma_trainer_edit": json.dumps(edit)}) == {
        "parents": [{"name": "a", "sha256": "1"}, {"name": "b"}]
    }


@pytest.mark.parametrize(
    "record", ["", "[]", "{", '{"step": "many", "parents": 3}', '{"parents": [1, null]}', "[" * 9000]
)
def test_damaged_records_name_nobody(named, record):
    assert named({"chroma_trainer": record}) == {}


def test_a_tree_without_end_is_cut(named):
    tree: dict = {"name": "x" * 5000}
    for _ in range(40):
        tree = {"name": "elder", "parents": [tree]}
    text = json.dumps(named({"chroma_trainer": json.dumps({"parents": [tree]})}))
    assert text.count("elder") == 16 and len(text) < 2000


def test_a_missing_file_is_named(workshop, tmp_path):
    with pytest.raises(UserError, match=r"init_lora: gone.safetensors can't be read"):
        parents_of(from_file(workshop, tmp_path / "gone.safetensors"))
