"""Runs with trackers: what arrives there, a resumed run as one curve, the same LoRA, and a run that a tracker can't end."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import string
import struct
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import CheckpointSaved, EvalReport, Notice, RunReported
from chroma_trainer.trainer_core.runs.event_log import read_events
from chroma_trainer.trainer_core.setup.preflight import problems_of
from chroma_trainer.trainer_core.trackers.event_file import EventFile
from chroma_trainer.trainer_core.trackers.tracker import Opening
from chroma_trainer.trainer_core.trackers.wandb import WeightsAndBiases
from chroma_trainer.trainer_core.train.run import run
from safetensors.torch import load_file

from tests.workshop import EVALUATED

DRAWN = ValidationConfig(prompts="a cat\na dog", resolutions="32x32", steps=2)
CURVES = {"train/loss", "train/loss_smoothed", "train/learning_rate", "train/grad_norm", "train/seconds_per_step"}


class FakeRun:
    """What wandb.init gives; refuses steps that it has, as the real one does."""

    def __init__(self, server: FakeServer, **given):
        self.server, self.given, self.dir, self.url = (
            server,
            given,
            str(Path(given["dir"]) / "wandb" / "run" / "files"),
            "https://wandb.example/run",
        )
        self.rows, self.summary, self.ended = server.rows.setdefault(given["id"], {}), {}, None
        self.threads: set[str] = set()
        self.artifacts: list[tuple[FakeArtifact, list[str]]] = []

    def log_artifact(self, artifact: FakeArtifact, aliases: list[str]) -> None:
        assert self.ended is None
        self.artifacts.append((artifact, aliases))

    @property
    def step(self) -> int:
        return max(self.rows, default=-1) + (1 if self.given["resume"] and not self.ended and not self.threads else 0)

    def log(self, values: dict, step: int) -> None:
        assert step >= max(self.rows, default=0), "wandb takes no earlier step"
        self.threads.add(threading.current_thread().name)
        self.rows.setdefault(step, {}).update(values)

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code


class FakeArtifact:
    """What wandb.Artifact makes: it reads its files when they are added."""

    def __init__(self, name: str, type: str, metadata: dict):
        assert set(name) <= {*string.ascii_letters, *string.digits, *"._-"} and len(name) <= 128
        self.name, self.type, self.metadata = name, type, json.loads(json.dumps(metadata))
        self.files: dict[str, bytes] = {}
        self.media: dict[str, object] = {}

    def add_file(self, path: str, name: str) -> None:
        self.files[name] = Path(path).read_bytes()

    def add(self, value: object, name: str) -> None:
        self.media[name] = value


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

        found.Artifact = FakeArtifact  # type: ignore[attr-defined]
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


@pytest.mark.slow
def test_wandb_gets_the_run_and_the_lora_is_the_same(workshop, wandb):
    request = replace(workshop.request(steps=3, **EVALUATED), validation=DRAWN)
    without = workshop.host()
    plain = run(request, without)
    assert not wandb.runs and not {"tensorboard", "wandb"} & {path.name for path in without.run_folder.iterdir()}
    host = workshop.host()
    result = run(replace(request, training=replace(request.training, trackers="wandb")), host)
    assert result.losses == plain.losses
    ours, theirs = (load_file(found.lora.path) for found in (result, plain))
    assert all(ours[name].equal(theirs[name]) for name in theirs)

    (sent,) = wandb.runs
    assert sent.ended == 0 and sent.threads == {"tracker wandb"}
    assert [sent.rows[step]["train/loss"] for step in (1, 2, 3)] == list(result.losses)
    assert all(sent.rows[step].keys() >= CURVES for step in (1, 2, 3)) and sent.rows[1]["train/RAM_gb"] > 0.01
    losses = {name: sent.rows[step]["eval/loss_on_training_images"] for name, step in (("before", 0), ("after", 3))}
    assert losses.items() <= result.report["eval_loss"].items()
    for step in (0, 3):
        size, caption = sent.rows[step]["validation/32x32"]
        assert min(size) >= 160 and caption == "a cat | a dog"
    assert sent.summary["lora"] == result.lora.path and sent.summary["sha256"] == result.lora.sha256
    assert sent.summary["eval_loss_after"] == result.report["eval_loss"]["after"]

    given = sent.given
    assert (
        given["config"]["training"]["rank"] == 4
        and given["config"]["images"] == 4
        and "torch" in given["config"]["versions"]
    )
    assert given["project"] == "chroma-trainer" and given["name"] == host.run_folder.name and given["resume"] is None
    assert given["id"].startswith(host.run_folder.name.rpartition("-")[2]) and Path(given["dir"]) == host.run_folder
    assert given["settings"].items() >= {"console": "off", "disable_git": True, "save_code": False}.items()
    assert "W&B: https://wandb.example/run" in host.told()
    saved = [path for path in host.run_folder.rglob("*") if path.is_file()]
    assert len(saved) > 5 and not any(b"a-secret" in path.read_bytes() for path in saved)


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_curve_at_wandb(workshop, wandb):
    request = workshop.request(trackers="wandb", steps=4, **EVALUATED)
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(request, host)
    assert wandb.runs[0].ended == 0  # the user's doing is no fault
    shutil.rmtree(host.run_folder / "checkpoints" / "step-000003")  # as if it had been killed after step 3
    result = run(request, host.cancelling_at(0))
    assert result.report["resumed_from"] == 2
    first, second = wandb.runs
    assert first.given["id"] == second.given["id"] and second.given["resume"] == "allow"
    assert [first.rows[step]["train/loss"] for step in (1, 2, 3, 4)] == list(result.losses)


@pytest.mark.slow
def test_a_run_that_begins_again_is_another_one_at_wandb(workshop, wandb):
    host = workshop.host()
    for _ in range(2):
        run(workshop.request(trackers="wandb", resume=False, steps=1), host)
    first, second = wandb.runs
    assert first.given["id"] != second.given["id"] and second.given["resume"] is None


def test_wandb_gets_loras_as_artifacts_where_asked(workshop, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_LOG_MODEL", "checkpoint")
    drawn = replace(DRAWN, prompts="a cat", steps=1, cfg=1.0)
    request = replace(
        workshop.request(trackers="wandb", name="styles/nächste", steps=2, checkpoint_every=1), validation=drawn
    )
    host = workshop.host()
    result = run(request, host)
    (sent,) = wandb.runs
    assert [aliases for _, aliases in sent.artifacts] == [
        ["latest", "step-1"], ["latest", "step-2"], ["latest", "final", "step-2"],
    ]  # fmt: skip
    final = sent.artifacts[-1][0]
    assert {artifact.name for artifact, _ in sent.artifacts} == {"lora-styles-n-chste"} and final.type == "model"
    assert final.files == {"nächste.safetensors": Path(result.lora.path).read_bytes()}
    (grid,) = final.media.items()
    assert (
        grid[0] == "validation/step-000002-32x32" and min(grid[1][0]) >= 160
    )  # pixels, not the file with the workflow
    assert final.metadata["sha256"] == result.lora.sha256 and final.metadata["settings"]["training"]["rank"] == 4
    assert sent.artifacts[0][0].files["lora.safetensors"] != sent.artifacts[1][0].files["lora.safetensors"]


@pytest.mark.parametrize(("mode", "count"), [("end", 1), ("TRUE", 1), ("false", 0), (None, 0)])
def test_no_lora_is_uploaded_unasked(wandb, monkeypatch, tmp_path, mode, count):
    if mode is not None:
        monkeypatch.setenv("WANDB_LOG_MODEL", mode)
    (lora := tmp_path / "cat.safetensors").write_bytes(b"x")
    (best := tmp_path / "cat-best.safetensors").write_bytes(b"y")
    tracker = WeightsAndBiases(Opening(tmp_path, "cat", {"training": {}}), lambda text: None)
    tracker.event(CheckpointSaved(1, tmp_path))
    tracker.event(RunReported({"lora": str(lora), "best": {"lora": str(best), "step": 1}, "steps": 2}))
    (sent,) = wandb.runs
    assert len(sent.artifacts) == count and WeightsAndBiases.last_seconds(60.0) == (1800.0 if count else 60.0)
    assert not count or set(sent.artifacts[0][0].files) == {"cat.safetensors", "cat-best.safetensors"}


def test_trackers_that_fail_end_no_run(workshop, wandb, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FakeRun, "log", fail)
    monkeypatch.setattr(EventFile, "add", fail)
    host = workshop.host()
    assert run(workshop.request(trackers="tensorboard+wandb", steps=2), host).report["steps"] == 2
    warnings = [event.text for event in host.all(Notice) if event.level == "warning"]
    for name in ("tensorboard", "wandb"):
        assert warnings.count(f"{name}: [Errno 28] No space left on device; the run continues without it") == 1


def test_what_is_missing_is_said_before_a_model_is_loaded(workshop, wandb, monkeypatch, tmp_path):
    request, host = workshop.request(trackers="tensorboard+wandb", **EVALUATED), workshop.host()
    assert problems_of(request, host) == []
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(
        UserError, match=r"trackers: wandb has no API key; set WANDB_API_KEY, or set WANDB_MODE=offline"
    ):
        run(request, host)
    assert not (host.paths.output / "loras").exists()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x", "utf-8")  # as `wandb login` writes it
    assert problems_of(request, host) == []
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.our-house.example:8080")
    assert len(problems_of(request, host)) == 1
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert problems_of(request, host) == []
    monkeypatch.setenv("WANDB_LOG_MODEL", "always")
    assert "WANDB_LOG_MODEL is 'always'; use end, checkpoint or false" in problems_of(request, host)[0].message

    def without(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", without)
    (problem,) = problems_of(request, host)
    assert problem.field == "trackers" and 'pip install "chroma-trainer[wandb]"' in problem.message


def test_the_choice_changes_no_record_and_no_run(workshop):
    from chroma_trainer.trainer_core.runs.manifest import settings_of

    plain, with_it = workshop.request(**EVALUATED), workshop.request(trackers="tensorboard", **EVALUATED)
    assert "trackers" not in plain.as_json()["training"] and with_it.as_json()["training"]["trackers"] == "tensorboard"
    assert settings_of(plain) == settings_of(with_it)


def test_losses_on_fixed_noise_are_events(workshop):
    host = workshop.host()
    result = run(workshop.request(holdout=0.25, steps=4), host)
    reports = {event.step: event for event in host.all(EvalReport)}
    assert sorted(reports) == [0, 2, 4] and all(event.held_out for event in reports.values())
    assert (
        reports[0].loss == result.report["eval_loss"]["before"]
        and reports[4].loss == result.report["eval_loss"]["after"]
    )
    kept = [event for event in read_events(host.run_folder) if event["kind"] == "EvalReport"]
    assert [event["step"] for event in kept][:3] == [0, 2, 4] and kept[0]["loss"] == reports[0].loss


def test_tensorboard_reads_a_resumed_run_as_one_curve(workshop):
    reading = pytest.importorskip(
        "tensorboard.backend.event_processing.plugin_event_accumulator",
        reason="needs TensorBoard, to read what was written",
    )
    request = replace(workshop.request(trackers="tensorboard", steps=4, **EVALUATED), validation=DRAWN)
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(request, host)
    shutil.rmtree(host.run_folder / "checkpoints" / "step-000003")
    result = run(request, host.cancelling_at(0))
    folder = host.run_folder / "tensorboard"
    assert result.report["resumed_from"] == 2 and len(list(folder.iterdir())) == 2
    found = reading.EventAccumulator(str(folder)).Reload()
    tags = set(found.Tags()["tensors"])
    hyper = {"_hparams_/session_start_info", "_hparams_/session_end_info"}
    assert tags == CURVES | hyper | {
        "train/RAM_gb",
        "eval/loss_on_training_images",
        "validation/32x32",
        "settings",
        "result",
    }
    loss = found.Tensors("train/loss")
    assert [point.step for point in loss] == [1, 2, 3, 4]
    assert [point.tensor_proto.float_val[0] for point in loss] == pytest.approx(result.losses, rel=1e-6)
    pictures = found.Tensors("validation/32x32")
    assert [picture.step for picture in pictures] == [0, 4]
    (last,) = (host.run_folder / "validation").glob("step-000004-*.png")
    assert pictures[1].tensor_proto.string_val[2] == last.read_bytes()
    described = found.SummaryMetadata("validation/32x32")
    assert described.plugin_data.plugin_name == "images" and described.summary_description == "a cat | a dog"
    summary = json.loads(found.Tensors("result")[-1].tensor_proto.string_val[0])
    assert summary["sha256"] == result.lora.sha256
    started = importlib.import_module("tensorboard.plugins.hparams.plugin_data_pb2").HParamsPluginData()
    started.ParseFromString(found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    values = started.session_start_info.hparams
    assert (
        values["training.rank"].number_value == 4
        and values["training.name"].string_value == "tiny"
        and values["training.resume"].bool_value
    )


def records(path: Path) -> Iterator[bytes]:
    """wandb's own file, in LevelDB's log format: blocks of 32 KiB, records in one part or several."""
    raw, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", raw[at + 4 : at + 7])
        part, at = part + raw[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            yield part
            part = b""


def test_the_real_wandb_keeps_a_run_offline(workshop, monkeypatch):
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="needs the wandb package, to write offline")
    monkeypatch.setenv("WANDB_MODE", "offline")
    host = workshop.host()
    result = run(replace(workshop.request(trackers="wandb", steps=2, **EVALUATED), validation=DRAWN), host)
    (path,) = host.run_folder.glob("wandb/offline-run-*/*.wandb")
    rows, summary, codes = {}, {}, []
    for raw in records(path):
        record = proto.Record()
        record.ParseFromString(raw)
        name = record.WhichOneof("record_type")
        if name == "history":
            rows[record.history.step.num] = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
            }
        elif name == "summary":
            summary |= {item.key: json.loads(item.value_json) for item in record.summary.update if item.key}
        elif name == "exit":
            codes.append(record.exit.exit_code)
    assert [rows[step]["train/loss"] for step in (1, 2)] == list(result.losses) and codes == [0]
    assert {name for name in rows[2] if name.startswith("validation/32x32")} and summary["sha256"] == result.lora.sha256
    assert any(
        text.startswith("W&B (offline): to upload it later, run wandb sync") and str(path.parent) in text
        for text in host.told()
    )
