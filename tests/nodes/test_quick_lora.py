"""QuickLora: the graph that `chroma-trainer new` writes, from a few choices, with the same bytes as that graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.cli import main
from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.nodes.wizard import quick_lora
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Notice, Paths, SinkHost
from chroma_trainer.trainer_core.wizard import card
from chroma_trainer.trainer_core.wizard.card import Card
from chroma_trainer.trainer_core.workflow.execute import execute
from chroma_trainer.trainer_core.workflow.overrides import override
from chroma_trainer.trainer_core.workflow.read import graph_from_json, read_workflow
from PIL import Image

SHORT = [
    "LoRATrainer.steps=2",
    "LoRATrainer.warmup_steps=0",
    "LoRATrainer.validate_every=0",
    "LoRATrainer.eval_images=0",
    "DatasetBackend.resolution=64",
    "ValidateSampler.steps=1",
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with my-dog: three large images, named after what they show."""
    folder = tmp_path / "my-dog"
    folder.mkdir()
    for name, color in (("brown dog", "brown"), ("dog in the snow", "white"), ("black dog", "black")):
        Image.new("RGB", (1100, 1000), color).save(folder / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(card, "detect_card", lambda name="": Card())
    return tmp_path


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs of QuickLora train two steps on small images."""
    whole = quick_lora.graph_of
    monkeypatch.setattr(quick_lora, "graph_of", lambda answers: override(whole(answers), SHORT, CATALOGUE))


def host_of(home: Path) -> SinkHost:
    return SinkHost(Paths(home / "output", home / "cache", datasets=(home,)))


def inputs(**values: Any) -> quick_lora.Inputs:
    return quick_lora.Inputs(**{"images": "my-dog", "name": "dog", **values})


def write(home: Path, **values: Any) -> str:
    node = {"class_type": "QuickLora", "inputs": {"images": "my-dog", "name": "dog", **values}}
    (home / "quick.json").write_text(json.dumps({"7": node}), "utf-8")
    return str(home / "quick.json")


def test_it_chooses_what_new_writes(home: Path, capsys: pytest.CaptureFixture):
    options = ["--model", "nano", "--images", "my-dog", "--learn", "subject", "--vram", "24", "--quality", "best"]
    main(["new", "--yes", *options, "--name", "dog", "--trigger", "zwx", "-o", "new.json"])
    chosen = {"model": "nano", "learn": "subject", "vram_gb": 24.0, "quality": "best", "name": "dog", "trigger": "zwx"}
    unfolded = quick_lora.unfold({"images": "my-dog", **chosen}, host_of(home))
    assert unfolded == json.loads((home / "new.json").read_text("utf-8"))


@pytest.mark.usefixtures("short")
def test_the_lora_is_that_of_the_unfolded_graph(home: Path):
    notices: list[str] = []
    host = SinkHost(host_of(home).paths, (lambda event: notices.append(event.text) if type(event) is Notice else None,))
    lora, weights, losses, name, choices = quick_lora.run(inputs(), host)
    graph = graph_from_json(quick_lora.unfold({"images": "my-dog", "name": "dog"}, host), schemas())
    elsewhere = SinkHost(Paths(home / "other", home / "cache", datasets=(home,)))
    outputs = execute(override(graph, SHORT, CATALOGUE), CATALOGUE, elsewhere)
    (unfolded,) = [values[0] for id, values in outputs.items() if graph.nodes[id].type == "LoRATrainer"]
    assert Path(lora.path).read_bytes() == Path(unfolded.path).read_bytes()
    assert weights and len(losses["loss"]) == 2 and name == "dog.safetensors"
    assert "| LoRA Trainer *rank* | 16 |" in choices and any("rank 16" in text for text in notices)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_headless_run_plan_captions_and_verify(home: Path, capsys: pytest.CaptureFixture):
    file = write(home)
    assert main(["check", file]) == main(["plan", file]) == main(["captions", file, "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "plan: fits" in printed and printed.count("mydogx, ") == 3
    assert main(["run", file]) == 0
    recorded = read_workflow(home / "output" / "loras" / "dog.safetensors", schemas())
    assert {node.type for node in recorded.nodes.values()} >= {"LoadChroma", "DatasetBackend", "LoRATrainer"}
    assert main(["verify", str(home / "output" / "loras" / "dog.safetensors"), "--datasets", str(home)]) == 0


def test_all_faults_at_once_and_at_their_fields(home: Path):
    wrong = inputs(model="hdd", images="my-dogs", name="a:b", trigger="x" * 101)
    problems = quick_lora.preflight(wrong, host_of(home))
    assert sorted(problem.field for problem in problems) == ["images", "model", "name", "trigger"]
    assert all("--" not in str(problem) for problem in problems)
    (outside,) = quick_lora.preflight(inputs(images=str(home.parent)), host_of(home))
    assert outside.field == "images" and "outside the allowed folders" in outside.message
    (empty,) = quick_lora.preflight(inputs(images=" "), host_of(home))
    assert empty.field == "images" and "is empty" in empty.message


def test_a_fault_of_the_graph_is_told_at_this_node(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(quick_lora, "graph_of", lambda answers: override(
        graph_from_json(quick_lora.unfold({"images": "my-dog"}, host_of(home)), schemas()), ["LoRATrainer.targets=nothing"], CATALOGUE
    ))  # fmt: skip
    (problem,) = quick_lora.preflight(inputs(), host_of(home))
    assert "in the graph that this node makes, LoRATrainer.targets: " in problem.message and not problem.node
    with pytest.raises(UserError, match="in the graph that this node makes"):
        quick_lora.run(inputs(), host_of(home))


def test_it_runs_again_when_an_image_changes(home: Path):
    fingerprint, paths = quick_lora.SPEC.fingerprint, host_of(home).paths
    assert fingerprint
    before = fingerprint({"images": "my-dog"}, paths)
    Image.new("RGB", (900, 900), "red").save(home / "my-dog" / "red dog.png")
    assert fingerprint({"images": "my-dog"}, paths) != before
