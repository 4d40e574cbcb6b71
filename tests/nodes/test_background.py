"""LoRATrainer in the background, and the node that gives the LoRA meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from chroma_trainer.cli import main
from chroma_trainer.nodes import lora_trainer
from chroma_trainer.nodes.lora_trainer import Inputs
from chroma_trainer.nodes.runs import latest_checkpoint
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import Notice, Paths, SinkHost
from chroma_trainer.trainer_core.launch.run_queue import RunQueue, unfinished
from chroma_trainer.trainer_core.runs.control import Status, write_status
from chroma_trainer.trainer_core.spec import ABSENT
from chroma_trainer.trainer_core.train.prepare import plan_run
from safetensors.torch import save_file


def inputs_of(workshop: Any, **values: Any) -> Inputs:
    request = workshop.request(**values)
    training = {field.name: getattr(request.training, field.name) for field in fields(TrainingConfig)}
    return Inputs(**training, model=request.model, dataset=request.dataset)


def test_the_node_queues_the_run_and_has_no_outputs_yet(workshop: Any):
    queued: list = []
    prompt = {"5": {"class_type": "LoRATrainer", "inputs": {"name": "tiny-%year%", "background": True}}}
    host = SinkHost(workshop.host().paths, prompt=prompt, node_id="5", background=lambda *values: queued.append(values))
    inputs = inputs_of(workshop, background=True, name="tiny-%year%")
    assert lora_trainer.run(inputs, host) == (ABSENT,) * 4
    ((request, recorded),) = queued
    assert request.training.background and "%" not in request.training.name
    assert recorded["5"]["inputs"]["name"] == request.training.name and "background" not in recorded["5"]["inputs"]


def test_a_command_ignores_it_and_says_so(workshop: Any):
    notices: list[str] = []

    def note(event: Any) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)

    host = SinkHost(workshop.host().paths, (note,), is_cancelled=lambda: True)
    with pytest.raises(Cancelled):
        lora_trainer.run(inputs_of(workshop, background=True), host)
    assert any("background is for ComfyUI and is ignored" in text for text in notices), notices


def test_it_is_part_of_no_record_and_of_no_name(workshop: Any):
    usual, background = workshop.request(), workshop.request(background=True, detached=True, devices="1")
    assert background.as_json() == usual.as_json()
    names = {plan_run(request, workshop.host()).folder.name for request in (usual, background)}
    assert len(names) == 1


def test_detached_needs_background():
    (problem,) = TrainingConfig(detached=True).problems()
    assert problem.field == "detached" and "switch background on" in problem.message
    assert TrainingConfig(detached=True, background=True).problems() == []


def test_comfyui_runs_the_node_again_after_a_run_that_did_not_finish(tmp_path: Path):
    paths = Paths(tmp_path, tmp_path / "cache")
    values = {"name": "again.safetensors", "background": True}
    before = lora_trainer.fingerprint(values, paths)
    assert before == lora_trainer.fingerprint(values, paths)
    unfinished["again"] += 1
    assert lora_trainer.fingerprint(values, paths) != before
    assert lora_trainer.fingerprint({**values, "background": False}, paths) == ""


def checkpoint(output: Path, run: str, step: int, state: str = "running") -> Path:
    """A run folder with a checkpoint of this step, whose LoRA says so."""
    folder = output / "chroma_trainer" / run
    target = folder / "checkpoints" / f"step-{step:06d}"
    target.mkdir(parents=True)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.full((8, 2), float(step))}
    save_file(tensors, target / "lora.safetensors")
    write_status(folder, Status(state, step, 100, "train"))
    return folder


def newest(output: Path, run: str = "") -> tuple[str, int]:
    tensors, path, step = latest_checkpoint.run(
        latest_checkpoint.Inputs(run=run), SinkHost(Paths(output, output / "cache"))
    )
    assert float(tensors[next(key for key in tensors if "lora_B" in key)][0, 0]) == step
    return Path(path).parents[2].name, step


def test_the_newest_checkpoint_of_a_run(tmp_path: Path):
    checkpoint(tmp_path, "styles~cat-11111111", 2)
    folder = checkpoint(tmp_path, "styles~cat-11111111", 10)
    os.utime(folder / "status.json", (1, 1))
    checkpoint(tmp_path, "dog-22222222", 4)
    assert newest(tmp_path) == ("dog-22222222", 4)
    for name in ("styles/cat", "styles/cat.safetensors", "styles\\cat", " styles~cat-11111111 "):
        assert newest(tmp_path, name) == ("styles~cat-11111111", 10), name
    (folder / "checkpoints" / "step-000012").mkdir()  # without a LoRA
    assert newest(tmp_path, "styles/cat")[1] == 10


def test_the_node_runs_again_when_there_is_a_newer_one(tmp_path: Path):
    paths = Paths(tmp_path, tmp_path / "cache")
    marks = [latest_checkpoint.fingerprint({"run": "cat"}, paths)]
    for step in (2, 4):
        folder = checkpoint(tmp_path, "cat-11111111", step)
        marks += [latest_checkpoint.fingerprint({"run": "cat"}, paths)]
    assert len(set(marks)) == 3
    write_status(folder, Status("running", 5, 100, "train"))
    assert latest_checkpoint.fingerprint({"run": "cat"}, paths) == marks[-1]


@pytest.mark.parametrize("name", ["nobody", "..", "../secret", "/etc", "", "a\0b", "x" * 5000])
def test_a_run_that_is_not_there(tmp_path: Path, name: str):
    (tmp_path / "output" / "chroma_trainer").mkdir(parents=True)
    shutil.copytree(checkpoint(tmp_path, "secret", 2), tmp_path / "secret")
    host = SinkHost(Paths(tmp_path / "output", tmp_path / "cache"))
    (problem,) = latest_checkpoint.preflight(latest_checkpoint.Inputs(run=name), host)
    assert problem.field == "run" and ("no run" in problem.message)


def test_a_run_without_a_checkpoint_yet(tmp_path: Path):
    folder = checkpoint(tmp_path, "cat-11111111", 2)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match=r"cat-11111111 has no checkpoint yet: .*checkpoint_every"):
        newest(tmp_path, "cat")


def test_headless_the_node_gives_the_lora_to_the_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint(tmp_path, "cat-11111111", 6)
    graph = {
        "1": {"class_type": "LatestCheckpoint", "inputs": {"run": "cat"}},
        "2": {"class_type": "ScaleLoRA", "inputs": {"lora_model": ["1", 0], "strength": 0.5, "save_as": "half"}},
    }
    (tmp_path / "graph.json").write_text(json.dumps(graph), "utf-8")
    assert main(["run", str(tmp_path / "graph.json"), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "loras" / "half.safetensors").is_file()
    assert "LoRA of cat-11111111 at step 6 of 100" in capsys.readouterr().err


def test_status_lists_what_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint(tmp_path, "cat-11111111", 6, "finished")
    queue = RunQueue(tmp_path)
    for name in ("dog", "owl"):
        queue.add(name, "5", {}, is_detached=False)
    queue.update(queue.add("fox", "5", {}, False), state="failed", message="there is no fox")
    assert main(["status", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "dog: waiting in the background, number 1",
        "owl: waiting in the background, number 2",
        "fox: failed in the background: there is no fox",
    ]
