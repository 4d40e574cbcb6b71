"""SweepSettings with LoRATrainer: the same sweep as the command's, from the graph alone."""

from __future__ import annotations

import json

import pytest
from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.nodes.comfyui.run_history import Backlog
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.host import Paths, SinkHost, SweepReported
from chroma_trainer.trainer_core.runs.control import Status, write_status
from chroma_trainer.trainer_core.sweep.stored_sweep import read_sweep
from chroma_trainer.trainer_core.workflow.check import check
from chroma_trainer.trainer_core.workflow.execute import execute
from chroma_trainer.trainer_core.workflow.read import graph_from_json

from tests.sweep.conftest import graph


def swept(training=None, **settings):
    nodes = graph(**(training or {}))
    nodes["5"]["inputs"]["sweep"] = ["6", 0]
    return {**nodes, "6": {"class_type": "SweepSettings", "inputs": settings}}


@pytest.fixture
def host(home, tmp_path):
    models = {"diffusers": (home / "models" / "diffusers",)}
    return lambda **values: SinkHost(
        Paths(tmp_path / "out", home / "cache", models=models, datasets=(home,)), device="cpu", **values
    )


def problems_of(prompt, host):
    return [str(problem) for problem in check(graph_from_json(prompt, schemas()), CATALOGUE, host)]


def test_check_reads_the_values_and_what_a_sweep_needs(host):
    faults = problems_of(swept(over="rank=2,x\nno_field=1,2\n"), host())
    assert (
        len(faults) == 1
        and "node 6 (SweepSettings).over: no_field=1,2: no node of the workflow has a field" in faults[0]
    )
    (fault,) = problems_of(swept(over="rank=2,9999"), host())
    assert fault.startswith("node 6 (SweepSettings).over: rank=9999: ")
    (fault,) = problems_of(swept(over=" \n"), host())
    assert "is empty; write a field and its values" in fault
    faults = problems_of(swept({"holdout": 0.0, "background": True}, over="rank=2,4", stop_losers=True), host())
    assert ["holdout" in fault or "background" in fault for fault in faults] == [True, True]
    assert problems_of(swept(over="--over rank=2,4\n\nDatasetBackend.resolution=32,64"), host()) == []


def test_a_graph_trains_a_sweep_and_puts_out_the_best(home, host, monkeypatch):
    monkeypatch.chdir(home)
    events: list = []
    prompt = swept({"steps": 2}, over="learning_rate=3,0.003", name="rates")
    outputs = execute(graph_from_json(prompt, schemas()), CATALOGUE, host(sinks=(events.append,)))
    lora, weights, losses, name = outputs["5"]
    table = read_sweep(host().paths.output, "rates")
    assert table and table["axes"] == ["learning_rate"] and table["planned"] == 2 and len(table["runs"]) == 2
    (best,) = [row for row in table["runs"] if row["is_best"]]
    assert lora.name == name and lora.folder.endswith(best["run"]) and weights and len(losses["loss"]) == 2
    assert name.replace("\\", "/") in (f"{best['name']}.safetensors", f"{best['name']}-best.safetensors")
    assert [len(event.runs) for event in events if isinstance(event, SweepReported)] == [0, 1, 2, 2]
    record = json.loads((host().paths.output / "chroma_trainer" / best["run"] / "request.json").read_text("utf-8"))
    assert "SweepSettings" not in json.dumps(record)  # each run stands for itself, and can be resumed alone
    story = Backlog(host().paths.output).story(host().paths.output / "chroma_trainer" / best["run"])
    assert story["sweep"] == table


def test_runs_in_the_background_are_queued_one_by_one(home, host, monkeypatch):
    """Nothing is trained here. The table comes from the folders of the runs, as they end."""
    monkeypatch.chdir(home)
    queued: list = []
    prompt = swept({"background": True}, over="rank=2,4")
    here = host(background=lambda *run: queued.append(run))
    assert len(execute(graph_from_json(prompt, schemas()), CATALOGUE, here)["5"]) == 4
    assert [request.training.name for request, _ in queued] == ["tiny/rank-2", "tiny/rank-4"]
    assert not any(request.training.background for request, _ in queued)
    assert [record["5"]["inputs"]["rank"] for _, record in queued] == [2, 4]
    output = here.paths.output
    table = read_sweep(output, "tiny")
    assert table and table["runs"] == [] and table["planned"] == 2
    folder = output / "chroma_trainer" / table["plans"][0]["run"]
    (folder / "checkpoints" / "step-000003").mkdir(parents=True)
    evaluation = {"judged": {"a": [0.5], "b": [0.7]}, "trained": {}}
    state = {"evaluations": {"0": evaluation, "3": evaluation}, "leaks": {}}
    (folder / "checkpoints" / "step-000003" / "state.json").write_text(json.dumps(state), "utf-8")
    (folder / "report.json").write_text('{"steps": 3, "seconds_per_step": 0.1, "stopped_early": null}', "utf-8")
    write_status(folder, Status("finished"))
    table = read_sweep(output, "tiny")
    assert table
    (row,) = table["runs"]
    assert row["loss"] == pytest.approx(0.6) and row["values"] == {"rank": "2"} and row["is_best"]
