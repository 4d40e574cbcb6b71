"""Runs with trackers: what arrives there, a resumed run as one curve, the same LoRA, and a run that a tracker can't end."""

from __future__ import annotations

import json
import os
import sys
import threading
import types
from importlib import metadata
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.host import EvalReport, Notice, StepReport
from chroma_trainer.trainer_core.problems import Cancelled, UserError
from chroma_trainer.trainer_core.train.journal import read_events
from chroma_trainer.trainer_core.train.preflight import problems_of
from chroma_trainer.trainer_core.train.run import run
from safetensors.torch import load_file

DRAWN = ValidationConfig(prompts="a cat\na dog", resolutions="32x32", steps=2)
CURVES = {"train/loss", "train/loss_smoothed", "train/learning_rate", "train/grad_norm", "train/seconds_per_step"}


class FakeRun:
    """What wandb.init gives; refuses steps that it has, as the real one does."""

    def __init__(self, server: FakeServer, **given):
        self.server, self.given, self.dir, self.url = server, given, str(Path(given["dir"]) / "wandb" / "run" / "files"), "https://wandb.example/run"
        self.rows, self.summary, self.ended = server.rows.setdefault(given["id"], {}), {}, None
        self.threads: set[str] = set()

    @property
    def step(self) -> int:
        return max(self.rows, default=-1) + (1 if self.given["resume"] and not self.ended and not self.threads else 0)

    def log(self, values: dict, step: int) -> None:
        assert step >= max(self.rows, default=0), "wandb takes no earlier step"
        self.threads.add(threading.current_thread().name)
        self.rows.setdefault(step, {}).update(values)

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code


class FakeServer:
    """The module wandb, and what was sent."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, dict]] = {}
        self.runs: list[FakeRun] = []
        self.broken_at = 0

    def module(self) -> types.ModuleType:
        found = types.ModuleType("wandb")

        def init(**given):
            self.runs.append(FakeRun(self, **given))
            return self.runs[-1]

        found.init, found.Settings, found.Image = init, dict, lambda picture, caption: (picture.size, caption)  # type: ignore[attr-defined]
        return found


@pytest.fixture
def wandb(monkeypatch):
    server, version = FakeServer(), metadata.version
    monkeypatch.setitem(sys.modules, "wandb", server.module())
    monkeypatch.setattr(metadata, "version", lambda name: "0.31.0" if name == "wandb" else version(name))
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    return server


def test_wandb_gets_the_run_and_the_lora_is_the_same(workshop, wandb):
    plain = run(workshop.request(DRAWN), workshop.host())
    host = workshop.host()
    result = run(workshop.request(DRAWN, trackers="wandb"), host)
    assert result.losses == plain.losses
    ours, theirs = (load_file(found.lora.path) for found in (result, plain))
    assert all(ours[name].equal(theirs[name]) for name in theirs)

    (sent,) = wandb.runs
    assert sent.ended == 0 and sent.threads == {"tracker wandb"}
    assert [sent.rows[step]["train/loss"] for step in range(1, 7)] == list(result.losses)
    assert all(sent.rows[step].keys() >= CURVES for step in range(1, 7)) and sent.rows[1]["train/RAM_gb"] > 0.01
    losses = {name: sent.rows[step]["eval/loss_on_training_images"] for name, step in (("before", 0), ("after", 6))}
    assert losses.items() <= result.report["eval_loss"].items()
    for step in (0, 6):
        size, caption = sent.rows[step]["validation/32x32"]
        assert min(size) >= 160 and caption == "a cat | a dog"
    assert sent.summary["lora"] == result.lora.path and sent.summary["sha256"] == result.lora.sha256
    assert sent.summary["eval_loss_after"] == result.report["eval_loss"]["after"]

    given = sent.given
    assert given["config"]["training"]["rank"] == 4 and given["config"]["images"] == 4 and "torch" in given["config"]["versions"]
    assert given["project"] == "chroma-trainer" and given["name"] == host.run_folder.name and given["resume"] is None
    assert given["id"].startswith(host.run_folder.name.rpartition("-")[2]) and Path(given["dir"]) == host.run_folder
    assert given["settings"].items() >= {"console": "off", "disable_git": True, "save_code": False}.items()
    assert "W&B: https://wandb.example/run" in host.told()
    saved = [path for path in host.run_folder.rglob("*") if path.is_file()]
    assert len(saved) > 5 and not any(b"a-secret" in path.read_bytes() for path in saved)


def test_a_resumed_run_goes_on_in_the_same_curve_at_wandb(workshop, wandb):
    request = workshop.request(DRAWN, trackers="wandb", checkpoint_every=2)
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(request, host)
    assert wandb.runs[0].ended == 0  # the user's doing is no fault
    for name in ("step-000003",):  # as if it had been killed after step 3
        for path in sorted((host.run_folder / "checkpoints" / name).rglob("*"), reverse=True):
            path.unlink()
        (host.run_folder / "checkpoints" / name).rmdir()
    result = run(request, host.cancelling_at(0))
    assert result.report["resumed_from"] == 2
    first, second = wandb.runs
    assert first.given["id"] == second.given["id"] and second.given["resume"] == "allow"
    assert [first.rows[step]["train/loss"] for step in range(1, 7)] == list(result.losses)


def test_a_run_that_begins_again_is_another_one_at_wandb(workshop, wandb):
    host = workshop.host()
    for _ in range(2):
        run(workshop.request(trackers="wandb", resume=False, steps=2), host)
    first, second = wandb.runs
    assert first.given["id"] != second.given["id"] and second.given["resume"] is None


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_told_once_and_left_alone(workshop, wandb, monkeypatch, call):
    def fail(*_, **__):
        raise OSError("no route to host\nand more")

    if call == "init":
        monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    else:
        monkeypatch.setattr(FakeRun, call, fail)
    host = workshop.host()
    result = run(workshop.request(trackers="tensorboard+wandb"), host)
    told = [event for event in host.all(Notice) if "wandb" in event.text]
    assert [(event.text, event.level) for event in told[-1:]] == [("wandb: no route to host; the run goes on without it", "warning")]
    assert sum(event.level == "warning" for event in told) == 1 and result.report["steps"] == 6
    assert list((host.run_folder / "tensorboard").iterdir())


def test_a_disk_that_takes_no_events_ends_no_run(workshop, tmp_path, monkeypatch):
    from chroma_trainer.trainer_core.trackers.event_file import EventFile

    def full(self, step, *values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventFile, "add", full)
    host = workshop.host()
    assert run(workshop.request(trackers="tensorboard"), host).report["steps"] == 6
    assert "tensorboard: [Errno 28] No space left on device; the run goes on without it" in host.told()


def test_what_is_missing_is_said_before_a_model_is_loaded(workshop, wandb, monkeypatch, tmp_path):
    request, host = workshop.request(trackers="tensorboard+wandb"), workshop.host()
    assert problems_of(request, host) == []
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match=r"trackers: wandb has no key here; set WANDB_API_KEY, or WANDB_MODE=offline"):
        run(request, host)
    assert not (host.paths.output / "loras").exists()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x", "utf-8")  # as `wandb login` writes it
    assert problems_of(request, host) == []
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.our-house.example:8080")
    assert len(problems_of(request, host)) == 1
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert problems_of(request, host) == []

    def without(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", without)
    (problem,) = problems_of(request, host)
    assert problem.field == "trackers" and 'pip install "chroma-trainer[wandb]"' in problem.message


def test_the_choice_changes_no_record_and_no_run(workshop):
    from chroma_trainer.trainer_core.train.world import settings_of

    plain, with_it = workshop.request(), workshop.request(trackers="tensorboard")
    assert "trackers" not in plain.as_json()["training"] and with_it.as_json()["training"]["trackers"] == "tensorboard"
    assert settings_of(plain) == settings_of(with_it)


def test_nothing_of_it_is_loaded_where_it_is_not_chosen(workshop, monkeypatch):
    for name in ("tensorboard", "wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    host = workshop.host()
    run(workshop.request(steps=2), host)
    assert not any(thread.name.startswith("tracker") for thread in threading.enumerate())
    assert not {"tensorboard", "wandb"} & {path.name for path in host.run_folder.iterdir()}


def test_losses_on_fixed_noise_are_events(workshop):
    host = workshop.host()
    result = run(workshop.request(holdout=0.25, checkpoint_every=2), host)
    reports = {event.step: event for event in host.all(EvalReport)}
    assert sorted(reports) == [0, 2, 4, 6] and all(event.held_out for event in reports.values())
    assert reports[0].loss == result.report["eval_loss"]["before"] and reports[6].loss == result.report["eval_loss"]["after"]
    kept = [event for event in read_events(host.run_folder) if event["kind"] == "EvalReport"]
    assert [event["step"] for event in kept][:3] == [0, 2, 4] and kept[0]["loss"] == reports[0].loss
    assert len(host.all(StepReport)) == 6


def accumulated(folder: Path):
    """The run's folder as TensorBoard itself reads it."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the tensorboard package to read what we wrote"
    )
    found = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={name: 0 for name in ("scalars", "images", "tensors")})
    return found.Reload()


def test_tensorboard_reads_a_resumed_run_as_one_curve(workshop):
    request = workshop.request(DRAWN, trackers="tensorboard", checkpoint_every=2)
    host = workshop.host().cancelling_at(5)
    with pytest.raises(Cancelled):
        run(request, host)
    checkpoint = host.run_folder / "checkpoints" / "step-000005"
    for path in sorted(checkpoint.rglob("*"), reverse=True):
        path.unlink()
    checkpoint.rmdir()
    result = run(request, host.cancelling_at(0))
    assert result.report["resumed_from"] == 4 and len(list((host.run_folder / "tensorboard").iterdir())) == 2
    found = accumulated(host.run_folder)
    assert set(found.Tags()["scalars"]) == CURVES | {"train/RAM_gb", "eval/loss_on_training_images"}
    loss = found.Scalars("train/loss")
    assert [point.step for point in loss] == [1, 2, 3, 4, 5, 6]
    assert [point.value for point in loss] == pytest.approx(result.losses, rel=1e-6)
    pictures = found.Images("validation/32x32")
    assert [picture.step for picture in pictures] == [0, 6]
    (last,) = (host.run_folder / "validation").glob("step-000006-*.png")
    assert pictures[1].encoded_image_string == last.read_bytes() and pictures[1].width >= 160
    summary = json.loads(found.Tensors("result/text_summary" if "result/text_summary" in found.Tags()["tensors"] else "result")[-1].tensor_proto.string_val[0])
    assert summary["sha256"] == result.lora.sha256
    assert found.SummaryMetadata("_hparams_/session_start_info").plugin_data.plugin_name == "hparams"
