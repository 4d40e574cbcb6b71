"""A LoRA is trained again from its own record: equal bytes, or what differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from chroma_trainer.cli import main
from chroma_trainer.trainer_core.storage import safetensors_header
from PIL import Image
from safetensors.torch import load_file, save_file

MODELS = ("--models", "models")


def graph(**training):
    values = {
        "name": "tiny", "rank": 2, "alpha": 2, "steps": 3, "learning_rate": 0.01, "warmup_steps": 0, "eval_images": 0,
        "gradient_checkpointing": False, "checkpoint_every": 0, **training,
    }  # fmt: skip
    return {
        "1": {"class_type": "LoadChroma", "inputs": {"folder": "tiny-chroma", "dtype": "fp32"}},
        "3": {"class_type": "DatasetBackend", "inputs": {"folder": "images", "resolution": 32}},
        "5": {"class_type": "LoRATrainer", "inputs": {"model": ["1", 0], "dataset": ["3", 0], **values}},
    }


@pytest.fixture(scope="module")
def home(tiny_chroma, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("verify")
    shutil.copytree(tiny_chroma, home / "models" / "diffusers" / "tiny-chroma")
    (home / "images").mkdir()
    for name, color in (("a", (200, 30, 20)), ("b", (20, 30, 200))):
        Image.new("RGB", (40, 40), color).save(home / "images" / f"{name}.png")
        (home / "images" / f"{name}.txt").write_text(f"a {name}", encoding="utf-8")
    (home / "workflow.json").write_text(json.dumps(graph()), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["run", "workflow.json", *MODELS, "--output", "out"]) == 0
    return home


@pytest.fixture
def lora(home, monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(home)
    return Path(shutil.copy(home / "out" / "loras" / "tiny.safetensors", tmp_path / "renamed.safetensors"))


def with_metadata(path: Path, change) -> Path:
    header = safetensors_header.read_header(path)
    metadata = change(dict(header.metadata))
    save_file(load_file(path), path, metadata)
    return path


def change_record(change):
    def apply(metadata):
        record = json.loads(metadata["chroma_trainer"])
        change(record)
        return {**metadata, "chroma_trainer": json.dumps(record, sort_keys=True)}

    return apply


def test_equal_bytes(lora, home, capsys):
    before = sorted(home.rglob("*"))
    assert main(["verify", str(lora), *MODELS]) == 0
    assert "byte for byte" in capsys.readouterr().out
    assert sorted(home.rglob("*")) == before  # nothing is left behind


def test_changed_weights_are_found(lora, capsys):
    tensors = load_file(lora)
    key = sorted(tensors)[3]
    tensors[key][0, 0] += 1
    save_file(tensors, lora, safetensors_header.read_header(lora).metadata)
    assert main(["verify", str(lora), *MODELS, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["equal"] and any(f"the weights differ from {key} on" in line for line in result["differences"])
    assert any("the device is not recorded, and here it is cpu" in line for line in result["differences"])


def test_another_package_is_reported_before_the_training(lora, capsys):
    with_metadata(lora, change_record(lambda record: record["versions"].update(torch="1.0")))
    assert main(["verify", str(lora), *MODELS]) == 1
    out = capsys.readouterr().out
    assert "not trained again" in out and f"torch 1.0 was used, here it is {torch.__version__}" in out
    assert main(["verify", str(lora), *MODELS, "--anyway"]) == 1
    out = capsys.readouterr().out
    assert f'record.versions.torch was "1.0", is "{torch.__version__}"' in out and "different:" in out


def test_another_dataset_is_reported_before_the_training(lora, home, capsys, tmp_path):
    other = tmp_path / "other" / "images"
    shutil.copytree(home / "images", other)
    (other / "a.txt").write_text("another caption", encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "elsewhere")
        assert main(["verify", str(lora), "--models", str(home / "models"), "--datasets", str(other.parent)]) == 1
    out = capsys.readouterr().out
    assert "the dataset differs (digest" in out and "images or captions were changed" in out


@pytest.mark.slow
def test_a_run_that_was_stopped_is_stopped_at_the_same_step(home, monkeypatch, tmp_path, capsys):
    from chroma_trainer.trainer_core.host import StepReport
    from chroma_trainer.trainer_core.lora_tools import verify as module

    monkeypatch.chdir(home)
    (tmp_path / "workflow.json").write_text(json.dumps(graph(name="stopped", steps=6)), encoding="utf-8")
    stop = _Stopper(StepReport, 4)
    monkeypatch.setattr("chroma_trainer.trainer_core.commands.run_command.Console", lambda: stop)
    monkeypatch.setattr("chroma_trainer.trainer_core.commands.run_command.Interrupts", lambda: stop.is_due)
    assert main(["run", str(tmp_path / "workflow.json"), *MODELS, "--output", str(tmp_path / "out")]) == 130
    monkeypatch.undo()
    monkeypatch.chdir(home)
    lora = tmp_path / "out" / "loras" / "stopped.safetensors"
    assert json.loads(safetensors_header.read_header(lora).metadata[module.RECORD])["step"] == 4
    assert main(["verify", str(lora), *MODELS]) == 0
    assert "byte for byte" in capsys.readouterr().out


class _Stopper:
    def __init__(self, kind, step):
        self.kind, self.step, self.due = kind, step, False

    def __call__(self, event):
        self.due |= isinstance(event, self.kind) and event.step >= self.step

    def is_due(self):
        return self.due


def test_files_that_can_not_be_verified(lora, tmp_path, capsys):
    assert main(["lora", "resize", str(lora), "--rank", "1", "-o", str(tmp_path / "small.safetensors")]) == 0
    assert main(["verify", str(tmp_path / "small.safetensors"), *MODELS]) == 2
    assert "was made by lora resize from renamed.safetensors (" in capsys.readouterr().err
    with_metadata(lora, lambda metadata: {"ss_network_dim": "4"})
    assert main(["verify", str(lora), *MODELS]) == 2
    assert "has no record of its training" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert main(["verify", str(lora), *MODELS, "--output", str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err
