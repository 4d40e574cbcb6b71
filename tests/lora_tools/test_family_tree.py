"""The family tree of a LoRA, from headers as the trainer and the tools write them, and what of it is on this machine."""

from __future__ import annotations

import json

from chroma_trainer.trainer_core.lora_tools.reader import open_lora
from chroma_trainer.trainer_core.lora_tools.report.family_tree import MAX_GENERATIONS, family_of, located
from chroma_trainer.trainer_core.lora_tools.writer import edited_metadata
from chroma_trainer.trainer_core.storage.atomic import sha256_of

from .conftest import native_tensors

MODEL = {
    "family": "chroma",
    "flavour": "nano",
    "repo": "chroma-nano",
    "dtype": "fp32",
    "quantization": {"level": "none"},
}


def record(step: int, parents: list | None = None) -> dict[str, str]:
    value = {"request": {"model": MODEL}, "step": step, **({"parents": parents} if parents else {})}
    return {"chroma_trainer": json.dumps(value)}


def tree_of(path):
    with open_lora(path) as lora:
        return family_of(lora)


def test_a_trained_lora_has_its_base_and_what_it_continued_from(save):
    first = {
        "name": "first.safetensors",
        "sha256": "a" * 64,
        "step": 100,
        "parents": [{"name": "zero", "sha256": "b" * 64}],
    }
    tree = tree_of(save(native_tensors(), record(250, [first])))
    parent, base = tree.parents
    assert (tree.steps, tree.operation, base.kind) == (250, "", "model") and "chroma nano" in base.name
    assert (parent.name, parent.sha256, parent.steps) == ("first.safetensors", "a" * 64, 100)
    assert [elder.name for elder in parent.parents] == ["zero"]


def test_a_merged_one_has_both_and_a_repaired_one_keeps_its_line(save):
    one = save(native_tensors(), record(100), "one.safetensors")
    two = save(native_tensors(), {}, "two.safetensors")
    with open_lora(one) as a, open_lora(two) as b:
        merged = save(
            native_tensors(),
            edited_metadata("lora merge", [(a, "strength 1"), (b, "strength 0.5")]),
            "merged.safetensors",
        )
    with open_lora(merged) as lora:
        fixed = save(native_tensors(), edited_metadata("doctor", [(lora, "")]), "fixed.safetensors")
    tree = tree_of(fixed)
    (parent,) = tree.parents
    assert (tree.operation, parent.operation, parent.sha256) == ("doctor", "lora merge", sha256_of(merged))
    first, second = parent.parents
    assert (first.name, first.steps, first.applied) == ("one.safetensors", 100, "strength 1")
    assert [base.kind for base in first.parents] == ["model"]
    assert (second.name, second.sha256, second.parents) == ("two.safetensors", sha256_of(two), ())


def test_one_parent_and_its_training(save):
    """The file has the record of its parent's training as its own."""
    one = save(native_tensors(), record(100, [{"name": "zero.safetensors", "sha256": "b" * 64}]), "one.safetensors")
    with open_lora(one) as lora:
        resized = save(
            native_tensors(), edited_metadata("lora resize", [(lora, "")], energy=0.95), "resized.safetensors"
        )
    (parent,) = tree_of(resized).parents
    assert (parent.name, parent.steps) == ("one.safetensors", 100)
    assert [elder.kind for elder in parent.parents] == ["file", "model"]


def test_what_is_on_this_machine(save, tmp_path):
    """A file by its name and bytes, and the run that logged its digest; a file of the same name alone is said to differ."""
    output, loras = tmp_path / "output", tmp_path / "loras"
    (loras / "old").mkdir(parents=True)
    one = save(native_tensors(), record(100), "one.safetensors").rename(loras / "old" / "one.safetensors")
    run = output / "chroma_trainer" / "one-12345678"
    run.mkdir(parents=True)
    event = {"kind": "LoraSaved", "sha256": sha256_of(one)}
    (run / "events.jsonl").write_text(f"[]\n{json.dumps(event)}\n", "utf-8")
    (loras / "two.safetensors").write_bytes(b"other")
    parents = [
        {"name": name, "sha256": digest}
        for name, digest in (("one.safetensors", sha256_of(one)), ("two.safetensors", "c" * 64))
    ]
    root = save(native_tensors(), record(300, parents), "root.safetensors")
    tree = located(tree_of(root), output, [loras], sha256_of, root)
    first, second, _ = tree.parents
    assert (first.file, first.run, first.is_changed) == ("old/one.safetensors", "one-12345678", False)
    assert (second.file, second.run, second.is_changed) == ("", "", True)
    assert (tree.file, tree.run, tree.is_changed) == ("", "", False)


def test_headers_that_hold_anything(save):
    endless: dict = {"name": "x", "sha256": "d" * 64}
    for _ in range(3 * MAX_GENERATIONS):
        endless = {"name": "x", "sha256": "d" * 64, "parents": [endless]}
    depth, node = 0, tree_of(save(native_tensors(), {"chroma_trainer": json.dumps({"parents": [endless]})}))
    while node.parents:
        depth, node = depth + 1, node.parents[0]
    assert depth == MAX_GENERATIONS
    for text in ("", "[]", "{", '{"parents": 5}', '{"parents": [5, {"name": [], "sha256": {}}], "step": true}'):
        for key in ("chroma_trainer", "chroma_trainer_edit"):
            tree = tree_of(save(native_tensors(), {key: text}))
            assert tree.steps is None and all(parent.name == "?" for parent in tree.parents)
