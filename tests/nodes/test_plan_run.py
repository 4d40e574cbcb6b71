"""PlanRun and `chroma-trainer plan`: the same figures, nothing loaded, nothing trained."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from chroma_trainer.cli import main
from chroma_trainer.nodes import ALL_NODES, lora_trainer, plan_run
from chroma_trainer.trainer_core.config.training import TrainingConfig
from chroma_trainer.trainer_core.host import SinkHost
from chroma_trainer.trainer_core.train.planning import plan_for

WORKFLOW = "workflows/first-lora.json"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def test_the_node_takes_what_the_trainer_takes():
    names = [field.name for field in plan_run.SPEC.fields()]
    trainer = [field.name for field in lora_trainer.SPEC.fields()]
    assert [name for name in names if name in trainer] == trainer and set(names) - set(trainer) == {"vram_gb", "ram_gb"}
    assert ALL_NODES["PlanRun"] is plan_run.SPEC


def test_plan_says_what_a_workflow_takes_and_trains_nothing(tmp_path, capsys):
    assert main(["plan", WORKFLOW, "--output", str(tmp_path), "--json", "--device", "cpu"]) == 0
    here = json.loads(capsys.readouterr().out)
    assert here["fits"] and here["advice"] == ""
    assert list(here["phases"]) == ["text", "latents", "load", "train", "save", "eval", "validate"]
    assert not list(tmp_path.rglob("*.safetensors"))
    assert main(["plan", WORKFLOW, "--output", str(tmp_path), "--vram", "0.6", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "does not fit" in told and ("cheapest change" in told or "no change" in told)


def test_a_plan_is_for_the_device_that_the_trainer_names(workshop):
    request, host = workshop.request(devices="cpu:1"), SinkHost(workshop.host().paths, device="no such device")
    settings = {field.name: getattr(request.training, field.name) for field in fields(TrainingConfig)}
    inputs = lora_trainer.Inputs(model=request.model, dataset=request.dataset, **settings)
    estimate, _ = plan_for(lora_trainer.request_of(inputs), host)
    assert not estimate.machine.device_bytes
