"""The loss on fixed noise: as many images as asked for, with progress, canceled between two of them, or off."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from chroma_trainer.nodes import lora_trainer, plan_run
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.config.training import EVAL_SIGMAS
from chroma_trainer.trainer_core.errors import Cancelled
from chroma_trainer.trainer_core.host import EvalReport, Notice, PhaseProgress, PhaseStarted
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.runs.manifest import settings_of
from chroma_trainer.trainer_core.trackers.dispatch import summary_of
from chroma_trainer.trainer_core.train import run as run_module
from chroma_trainer.trainer_core.train.hooks import checkpointer
from chroma_trainer.trainer_core.train.run import run

from tests.workshop import EVALUATED


def passes(monkeypatch) -> list:
    """Record each forward pass without gradients."""
    calls: list = []
    predict = ChromaFamily.predict

    def spy(self, transformer, x_sigma, sigma, text, **others):
        calls.extend(sigma.tolist() if len(sigma) == 1 and not others.get("route") else [])
        return predict(self, transformer, x_sigma, sigma, text, **others)

    monkeypatch.setattr(ChromaFamily, "predict", spy)
    monkeypatch.setattr(run_module, "fit", lambda *_: None)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "count"), [(16, 4), (2, 2), (0, 0)])
def test_as_many_images_as_asked_for(workshop, monkeypatch, asked, count):
    calls, host = passes(monkeypatch), workshop.host()
    part = replace(workshop.dataset.parts[0], trigger="")  # else the leak is measured too
    dataset = DatasetConfig((part,), workshop.dataset.roots)
    report = run(replace(workshop.request(eval_images=asked), dataset=dataset), host).report
    assert calls == [*EVAL_SIGMAS] * (2 * count)
    started = [event for event in host.all(PhaseStarted) if event.phase == "eval"]
    assert [(event.total, event.unit) for event in started] == [(count, "images")] * (2 if count else 0)
    done = [event.done for event in host.all(PhaseProgress) if event.phase == "eval"]
    assert done == [*range(1, count + 1)] * 2
    losses = report["eval_loss"]
    assert all((losses[when] is None) == (count == 0) for when in ("before", "after"))
    assert len(host.all(EvalReport)) == (2 if count else 0)
    assert ("eval_loss_after" in summary_of(report)) == (count > 0)


def test_it_can_be_canceled(workshop):
    """64 forward passes at true size take minutes on a CPU."""
    seen = []

    def sink(event):
        seen.append(event)

    host = workshop.host(sink=sink)
    object.__setattr__(
        host, "is_cancelled", lambda: any(isinstance(e, PhaseProgress) and e.phase == "eval" for e in seen)
    )
    with pytest.raises(Cancelled):
        run(workshop.request(**EVALUATED), host)
    assert [event.done for event in seen if isinstance(event, PhaseProgress) and event.phase == "eval"] == [1]


def test_it_does_not_touch_the_run(workshop):
    """Not its name, not its record while it is the default, not its bytes."""
    plain, off = workshop.request(eval_images=16), workshop.request(eval_images=0)
    assert "eval_images" not in plain.as_json()["training"] and settings_of(plain) == settings_of(off)
    results = [run(request, workshop.host()) for request in (plain, off)]
    assert results[0].losses == results[1].losses


def test_held_out_images_need_it(workshop):
    (problem,) = workshop.request(holdout=0.25, eval_images=0).training.problems()
    assert problem.field == "eval_images" and "holdout" in problem.message


@pytest.mark.slow
def test_a_checkpoint_is_not_measured_twice(workshop):
    """The last one is that of the end of the training."""
    host = workshop.host()
    run(workshop.request(holdout=0.25, steps=2, checkpoint_every=0), host)
    assert len([event for event in host.all(PhaseStarted) if event.phase == "eval"]) == 2
    assert any("loss on held-out images" in event.text for event in host.all(Notice))


def test_saved_workflows_read_their_values_by_position():
    """New fields come last, also in PlanRun, which has fields of its own after those of the trainer."""
    later = ["eval_images", "preservation", "loss", "huber_c", "loss_weighting", "noise_choice", "devices"]
    later += ["stop_when", "patience", "background", "detached", "shard"]
    for spec in (lora_trainer.SPEC, plan_run.SPEC):
        assert [field.name for field in spec.fields()][-len(later) :] == later
    widgets = [field.name for field in plan_run.SPEC.fields() if field.is_widget]
    assert widgets[-len(later) - 2 :] == ["vram_gb", "ram_gb", *later]


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 6])
def test_an_evaluation_that_was_canceled_is_done_after_the_resume(workshop, monkeypatch, step):
    """Ctrl-C during it: the checkpoint was saved without it, and its step could no longer be the best one.

    At the last step there was neither a checkpoint nor a LoRA.
    """
    request = workshop.request(holdout=0.25, steps=6)
    whole = run(request, workshop.host())
    host = workshop.host()

    def cancel(state, host):
        if state.step == step:
            raise Cancelled
        return measure(state, host)

    measure = checkpointer.measure
    monkeypatch.setattr(checkpointer, "measure", cancel)
    with pytest.raises(Cancelled):
        run(request, host)
    assert host.checkpoints[-1] == f"step-{step:06}" and host.lora.is_file()
    monkeypatch.undo()
    resumed = run(request, workshop.host(host.paths.output))
    assert resumed.report["best"]["step"] == whole.report["best"]["step"] and resumed.lora.sha256 == whole.lora.sha256
    last = host.run_folder / "checkpoints" / "step-000006" / "state.json"
    assert list(json.loads(last.read_text("utf-8"))["eval_losses"]) == ["2", "4", "6"][: 2 if step == 6 else 3]
