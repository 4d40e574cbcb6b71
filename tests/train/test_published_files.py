"""No path of a machine in what a run publishes, and what is published is enough to run again elsewhere."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chroma_trainer.cli import main
from PIL import Image


def make_data(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (40, 40), (90 * number, 30, 20)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a cat {number}", encoding="utf-8")
    return folder


def workflow(folder: str) -> dict:
    training = {
        "name": "tiny", "rank": 2, "alpha": 2, "steps": 1, "learning_rate": 0.01, "warmup_steps": 0, "validate_every": 1,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return {
        "1": {"class_type": "LoadChroma", "inputs": {"folder": "tiny-chroma", "dtype": "fp32"}},
        "3": {"class_type": "DatasetBackend", "inputs": {"folder": folder, "resolution": 32}},
        "4": {"class_type": "ValidateSampler", "inputs": {"prompts": "a cat", "steps": 1, "resolutions": "32x32"}},
        "5": {
            "class_type": "LoRATrainer",
            "inputs": {"model": ["1", 0], "dataset": ["3", 0], "validation": ["4", 1], **training},
        },
    }


@contextmanager
def here(folder: Path, monkeypatch) -> Iterator[None]:
    """Work in this folder, and put the signals back afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_equal_data_anywhere_give_equal_files_without_a_path_and_run_again(tiny_chroma, tmp_path, monkeypatch, capsys):
    (tmp_path / "models" / "diffusers").mkdir(parents=True)
    shutil.copytree(tiny_chroma, tmp_path / "models" / "diffusers" / "tiny-chroma")
    models = ("--models", str(tmp_path / "models"))
    alice = make_data(tmp_path / "home" / "alice" / "secret" / "cats")
    monkeypatch.setenv("CHROMA_TRAINER_ROOTS", str(alice.parent))
    with here(tmp_path / "one", monkeypatch):
        (Path("w.json")).write_text(json.dumps(workflow(str(alice))), encoding="utf-8")
        assert main(["run", "w.json", *models, "--output", "out"]) == 0
    monkeypatch.delenv("CHROMA_TRAINER_ROOTS")
    out = tmp_path / "one" / "out"
    (folder,) = (out / "chroma_trainer").glob("tiny-*")
    published = [
        out / "loras" / "tiny.safetensors", folder / "request.json", folder / "world.json",
        *folder.rglob("*.png"), *folder.glob("checkpoints/*/lora.safetensors"),
    ]  # fmt: skip
    assert len(published) >= 8
    for path in published:
        raw = path.read_bytes()
        for text in (str(tmp_path), "alice", "secret"):
            assert text.encode() not in raw and json.dumps(text)[1:-1].encode() not in raw, path
    capsys.readouterr()
    assert main(["inspect", str(published[0]), "--json"]) == 0
    assert str(tmp_path) not in capsys.readouterr().out

    bob = make_data(tmp_path / "mnt" / "bob" / "cats")  # the LoRA file is the workflow, on another machine
    with here(tmp_path / "two", monkeypatch):
        assert main(["run", str(published[0]), *models, "--output", "out", "--datasets", str(bob.parent)]) == 0
    again = tmp_path / "two" / "out"
    assert (again / "loras" / "tiny.safetensors").read_bytes() == published[0].read_bytes()
    (other,) = (again / "chroma_trainer").glob("tiny-*")
    assert other.name == folder.name
    for name in ("request.json", "loss.png", "density.png"):
        assert (other / name).read_bytes() == (folder / name).read_bytes()
    assert not (other / "paths.json").exists()

    monkeypatch.setenv("CHROMA_TRAINER_ROOTS", str(alice.parent))
    shutil.rmtree(folder / "checkpoints")
    with here(tmp_path / "three", monkeypatch):  # on this machine the run's own record finds its data
        assert main(["check", str(folder / "request.json"), *models]) == 0
        moved = shutil.copy(folder / "request.json", "request.json")
        assert main(["check", str(moved), *models]) == 0  # the folder's parent is allowed, and its name is recorded
        monkeypatch.delenv("CHROMA_TRAINER_ROOTS")
        assert main(["check", str(moved), *models]) == 2
        assert "'cats' is not a folder in" in capsys.readouterr().err
