"""Held-out images: each evaluation beside the earlier ones, and a run that ends once it is no longer better."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from chroma_trainer.trainer_core.config.dataset import DatasetConfig, FolderConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import EvalCompared, Notice, StepReport
from chroma_trainer.trainer_core.runs.control import read_status
from chroma_trainer.trainer_core.runs.event_log import read_events
from chroma_trainer.trainer_core.runs.manifest import settings_of
from chroma_trainer.trainer_core.train.run import run
from PIL import Image

from tests.workshop import EVALUATED


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> DatasetConfig:
    """Ten images, of which four are held out at 0.4."""
    folder = tmp_path_factory.mktemp("ten")
    for i in range(10):
        image = Image.new("RGB", (32, 32), (25 * i, 200 - 20 * i, 30))
        image.paste((255 - 25 * i, 20, 20 * i), (4, 4, 20, 28 - 2 * i))
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a cat {i}", "utf-8")
    return DatasetConfig(parts=(FolderConfig(folder=str(folder), resolution=32),), roots=(str(folder),))


def request_of(workshop, dataset, **values):
    request = workshop.request(
        **{"holdout": 0.4, "steps": 7, "checkpoint_every": 1, "name": "held", "eval_images": 4, **values}
    )
    return replace(request, dataset=dataset)


HARMFUL = {"learning_rate": 0.3, "stop_when": "no longer better", "patience": 2}  # every step makes it worse


def test_each_evaluation_is_compared(workshop, dataset):
    host = workshop.host()
    report = run(request_of(workshop, dataset, steps=3), host).report
    events = host.all(EvalCompared)
    assert [event.step for event in events] == [1, 2, 3] and all(len(event.gaps) == 4 for event in events)
    losses = report["eval_loss"]
    assert losses["change"]["mean"] == pytest.approx(losses["after"] - losses["before"])
    assert 0 < losses["change"]["standard_error"] < losses["standard_error"][1] / 3
    assert [entry["step"] for entry in losses["evaluations"]] == [0, 1, 2, 3]
    assert set(losses["evaluations"][-1]["gap_by_sigma"]) == {"0.125", "0.375", "0.625", "0.875"}
    stored = [event for event in read_events(host.run_folder) if event["kind"] == "EvalCompared"]
    assert [event["change"] for event in stored] == [event.change for event in events]
    status = read_status(host.run_folder)
    assert status and "held-out loss" in status.text() and "at step 3" in status.text()


def test_a_run_without_held_out_images_tells_its_change_too(workshop):
    losses = run(workshop.request(steps=2, **EVALUATED), workshop.host()).report["eval_loss"]
    assert losses["change"]["mean"] == pytest.approx(losses["after"] - losses["before"]) and "evaluations" not in losses


@pytest.mark.slow
def test_a_run_that_gets_worse_ends_early(workshop, dataset):
    host = workshop.host()
    result = run(request_of(workshop, dataset, **HARMFUL), host)
    step = result.report["steps"]
    assert step < 7 and step == host.all(StepReport)[-1].step and "held-out" in result.report["stopped_early"]
    assert result.report["eval_loss"]["evaluations"][-1]["best"] == step - 2
    assert any(f"ends at step {step} of 7" in text for text in host.told())
    status = read_status(host.run_folder)
    assert status and status.state == "finished" and (host.paths.output / "loras" / "held-best.safetensors").is_file()
    again = workshop.host(host.paths.output)
    assert run(request_of(workshop, dataset, **HARMFUL), again).lora.sha256 == result.lora.sha256
    assert not again.all(StepReport)  # it is over, and stays so
    longer = run(request_of(workshop, dataset, **{**HARMFUL, "patience": 1000}), workshop.host(host.paths.output))
    assert longer.report["steps"] == 7 and longer.report["stopped_early"] is None


@pytest.mark.slow
def test_a_run_that_gets_better_does_not(workshop, dataset):
    request = request_of(workshop, dataset, stop_when="no longer better", patience=2, learning_rate=3e-3)
    report = run(request, workshop.host()).report
    assert report["steps"] == 7 and report["stopped_early"] is None
    assert report["eval_loss"]["after"] < report["eval_loss"]["before"]


@pytest.mark.slow
def test_an_interrupted_run_ends_at_the_same_step_with_the_same_bytes(workshop, dataset):
    request = request_of(workshop, dataset, **HARMFUL)
    whole_host, host = workshop.host(), workshop.host()
    whole = run(request, whole_host)
    with pytest.raises(Cancelled):
        run(request, host.cancelling_at(1))
    resumed = run(request, workshop.host(host.paths.output))
    assert resumed.lora.sha256 == whole.lora.sha256 and resumed.report["steps"] == whole.report["steps"]
    states = [
        (max((folder / "checkpoints").iterdir()) / "state.json").read_bytes()
        for folder in (whole_host.run_folder, host.run_folder)
    ]
    assert states[0] == states[1] and json.loads(states[0])["evaluations"]


@pytest.mark.slow
def test_it_changes_nothing_where_it_does_not_stop(workshop, dataset):
    plain, early = (request_of(workshop, dataset, steps=2, stop_when=when) for when in ("never", "no longer better"))
    assert "stop_when" not in plain.as_json()["training"] and "patience" not in plain.as_json()["training"]
    assert settings_of(plain) == settings_of(early)
    hosts = [workshop.host(), workshop.host()]
    assert len({run(request, host).losses for request, host in zip((plain, early), hosts, strict=True)}) == 1


@pytest.mark.parametrize(
    ("values", "field", "text"),
    [
        ({"holdout": 0.0}, "stop_when", "set holdout to 0.1"),
        ({"eval_images": 3}, "stop_when", "needs 4 or more eval_images"),
        ({"checkpoint_every": 0}, "stop_when", "decides at checkpoints"),
        ({"holdout": 0.1}, "holdout", "1 of 10 are held out; set holdout to 0.4 or more"),
    ],
)
def test_what_it_needs_is_asked_for_before_the_run(workshop, dataset, values, field, text):
    request = request_of(workshop, dataset, **{"stop_when": "no longer better", **values})
    with pytest.raises(UserError) as raised:
        if problems := request.training.problems():
            raise UserError(problems)
        run(request, workshop.host())
    (problem,) = raised.value.problems
    assert problem.field == field and text in problem.message


@pytest.mark.slow
def test_overfitting_is_reported_once(workshop, dataset, monkeypatch):
    from chroma_trainer.trainer_core.train.figures import paired_evals
    from chroma_trainer.trainer_core.train.hooks import eval_loss

    for module in (paired_evals, eval_loss):
        monkeypatch.setattr(module, "overfits", lambda evaluations: len(evaluations) > 2)
    host = workshop.host()
    report = run(request_of(workshop, dataset, steps=4), host).report
    warnings = [notice.text for notice in host.all(Notice) if "the run overfits" in notice.text]
    assert len(warnings) == 1 and warnings[0].startswith("step 2:")
    assert [entry.get("overfits") for entry in report["eval_loss"]["evaluations"]] == [None, False, True, True, True]
    status = read_status(host.run_folder)
    assert status and status.text().endswith("the run overfits")
