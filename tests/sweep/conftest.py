"""A working folder with a tiny model, ten images of which four are held out, and a workflow."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.cli import main
from PIL import Image


def graph(**training: Any) -> dict[str, Any]:
    values = {
        "name": "tiny", "rank": 2, "alpha": 2, "steps": 3, "learning_rate": 0.003, "warmup_steps": 0, "eval_images": 4,
        "gradient_checkpointing": False, "checkpoint_every": 1, "holdout": 0.4, "lr_schedule": "constant", **training,
    }  # fmt: skip
    return {
        "1": {"class_type": "LoadChroma", "inputs": {"folder": "tiny-chroma", "dtype": "fp32"}},
        "3": {"class_type": "DatasetBackend", "inputs": {"folder": "images", "resolution": 32, "trigger": "sks"}},
        "5": {"class_type": "LoRATrainer", "inputs": {"model": ["1", 0], "dataset": ["3", 0], **values}},
    }


@pytest.fixture(scope="module")
def home(tiny_chroma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("sweep")
    shutil.copytree(tiny_chroma, home / "models" / "diffusers" / "tiny-chroma")
    (home / "images").mkdir()
    for i in range(10):
        image = Image.new("RGB", (32, 32), (25 * i, 200 - 20 * i, 30))
        image.paste((255 - 25 * i, 20, 20 * i), (4, 4, 20, 28 - 2 * i))
        image.save(home / "images" / f"{i}.png")
        (home / "images" / f"{i}.txt").write_text(f"a cat {i}", encoding="utf-8")
    (home / "workflow.json").write_text(json.dumps(graph()), encoding="utf-8")
    return home


@pytest.fixture
def cli(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """cli("sweep", ...) in the working folder, with the signals put back afterwards."""
    monkeypatch.chdir(home)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda *arguments: main([*map(str, arguments), "--models", "models"])
    for number, handler in handlers.items():
        signal.signal(number, handler)
