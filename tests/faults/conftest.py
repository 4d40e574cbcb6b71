"""A home for jobs: a tiny Chroma, four pictures, and a workflow with everything that is random switched on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tests.scripts import load_script

TRAINING = {
    "name": "killed", "rank": 2, "alpha": 2.0, "targets": "all+ffs", "steps": 8, "batch_size": 2, "accumulation": 2,
    "learning_rate": 0.01, "lr_schedule": "cosine", "warmup_steps": 2, "gradient_checkpointing": False,
    "caption_dropout": 0.3, "checkpoint_every": 2, "keep_checkpoints": 2, "validate_every": 3, "holdout": 0.25, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="session")
def home(tiny_chroma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tiny_chroma, tmp_path_factory.mktemp("faults"))


def make_home(tiny_chroma: Path, home: Path) -> Path:
    """Fill a folder with models/, pictures/ and workflow.json."""
    shutil.copytree(tiny_chroma, home / "models" / "diffusers" / "tiny-chroma")
    (home / "pictures").mkdir()
    for i in range(6):
        Image.new("RGB", (48, 40), (40 * i, 250 - 40 * i, 90)).save(home / "pictures" / f"{i}.png")
        (home / "pictures" / f"{i}.txt").write_text(f"a picture of {i}", "utf-8")
    graph = {
        "1": {"class_type": "LoadChroma", "inputs": {"folder": "tiny-chroma", "dtype": "fp32"}},
        "3": {
            "class_type": "DatasetBackend",
            "inputs": {"folder": "pictures", "resolution": 32, "crop_style": "random"},
        },
        "4": {
            "class_type": "ValidateSampler",
            "inputs": {"prompts": "a picture", "steps": 1, "cfg": 1.0, "resolutions": "32x32", "lora_strength": "1.0"},
        },
        "5": {
            "class_type": "LoRATrainer",
            "inputs": {"model": ["1", 0], "dataset": ["3", 0], "validation": ["4", 1], **TRAINING},
        },
    }
    (home / "workflow.json").write_text(json.dumps(graph), "utf-8")
    return home


@pytest.fixture(scope="session")
def kills() -> ModuleType:
    return load_script(Path(__file__).with_name("kills.py"))
