"""`chroma-trainer compare`: base, A and B on the same images, noise and prompts."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from chroma_trainer.cli import main
from chroma_trainer.trainer_core.comparison.compare_loras import Comparison, Contender, Measured
from chroma_trainer.trainer_core.storage.safetensors_header import read_header
from chroma_trainer.trainer_core.train.figures.paired_evals import Evaluation
from PIL import Image
from safetensors.torch import load_file, save_file

MODELS = ("--models", "models")


def graph() -> dict:
    values = {
        "name": "a", "rank": 2, "alpha": 2, "steps": 2, "learning_rate": 0.5, "warmup_steps": 1, "eval_images": 4,
        "gradient_checkpointing": False, "checkpoint_every": 0, "holdout": 0.4, "validate_every": 0,
    }  # fmt: skip
    prompts = {"prompts": "sks, a cat\na dog", "steps": 1, "cfg": 1.0, "resolutions": "32x32"}
    return {
        "1": {"class_type": "LoadChroma", "inputs": {"folder": "tiny-chroma", "dtype": "fp32"}},
        "3": {"class_type": "DatasetBackend", "inputs": {"folder": "images", "resolution": 32, "trigger": "sks"}},
        "4": {"class_type": "ValidateSampler", "inputs": prompts},
        "5": {"class_type": "LoRATrainer", "inputs": {"model": ["1", 0], "dataset": ["3", 0], "validation": ["4", 1], **values}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def home(tiny_chroma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained LoRA `a`, and `b`, which is half of it."""
    home = tmp_path_factory.mktemp("compare")
    shutil.copytree(tiny_chroma, home / "models" / "diffusers" / "tiny-chroma")
    for folder, count in (("images", 10), ("given", 5)):
        (home / folder).mkdir()
        for i in range(count):
            image = Image.new("RGB", (32, 32), (25 * i, 200 - 20 * i, 30))
            image.paste((255 - 25 * i, 20, 20 * i), (4, 4, 20, 28 - 2 * i))
            image.save(home / folder / f"{i}.png")
            (home / folder / f"{i}.txt").write_text(f"a cat {i}", encoding="utf-8")
    (home / "workflow.json").write_text(json.dumps(graph()), encoding="utf-8")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["run", "workflow.json", *MODELS, "--output", "out"]) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    loras = home / "out" / "loras"
    weights = load_file(loras / "a.safetensors")
    save_file(
        {key: value / (2 if "lora_B" in key or "lora_up" in key else 1) for key, value in weights.items()},
        loras / "b.safetensors",
    )
    return home


@pytest.fixture
def cli(home, monkeypatch):
    monkeypatch.chdir(home)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda *arguments: main(["compare", *map(str, arguments), *MODELS, "--output", "out"])
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_held_out_images_and_a_grid(cli, home, capsys):
    """The losses are those that the run itself has measured."""
    assert cli("a", "out/loras/b.safetensors", "--workflow", "workflow.json") == 0
    printed = capsys.readouterr()
    assert "loss on 4 held-out images" in printed.out and "B - A:" in printed.out and "leak" in printed.out
    result = json.loads((home / "out" / "comparisons" / "a-b" / "result.json").read_text("utf-8"))
    (folder,) = (path for path in (home / "out" / "chroma_trainer").glob("a-*"))
    report = json.loads((folder / "report.json").read_text("utf-8"))["eval_loss"]
    assert result["loss"]["base"]["mean"] == pytest.approx(report["before"], rel=1e-6)
    assert result["loss"]["A"]["mean"] == pytest.approx(report["after"], rel=1e-4)
    assert result["difference"]["A - base"]["mean"] == pytest.approx(report["after"] - report["before"], rel=1e-3)
    assert set(result["difference"]["B - A"]["by_sigma"]) == {"0.125", "0.375", "0.625", "0.875"}
    (grid,) = result["grids"]
    with Image.open(home / grid) as page:
        assert page.width > 600  # base, A and B beside each other
    assert len(list((home / "out" / "chroma_trainer").glob("a-*"))) == 1  # no run was started


@pytest.mark.slow
def test_given_images(cli, home, capsys):
    text = json.dumps({key: value for key, value in graph().items() if key != "4"} | {
        "5": {"class_type": "LoRATrainer", "inputs": {k: v for k, v in graph()["5"]["inputs"].items() if k != "validation"}}
    })  # fmt: skip
    (home / "no-images.json").write_text(text, "utf-8")
    assert cli("a", "b", "--workflow", "no-images.json", "--images", "given", "--json") == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["images"] == {"count": 5, "of": "given images"} and result["grids"] == []
    assert "no ValidateSampler is connected" in printed.err


@pytest.mark.slow
def test_the_images_that_a_lora_was_trained_on_are_told(cli, home, capsys):
    """With --images too, where all of them judge, and of a run that held none out."""
    file = home / "out" / "loras" / "a.safetensors"
    metadata = dict(read_header(file).metadata)
    record = json.loads(metadata["chroma_trainer"])
    record["request"]["training"]["holdout"] = 0.0
    save_file(load_file(file), home / "c.safetensors", metadata | {"chroma_trainer": json.dumps(record)})
    assert cli("c.safetensors", "b", "--workflow", "workflow.json", "--images", "images") == 0
    assert "A was trained on this dataset with holdout 0.0, so it may know the images" in capsys.readouterr().err


def test_all_faults_of_the_files_at_once(cli, home, capsys):
    (home / "broken.safetensors").write_bytes(b"no LoRA")
    assert cli("aa", "broken.safetensors", "--workflow", "workflow.json") == 2
    text = capsys.readouterr().err
    assert "there is no LoRA 'aa'" in text and "broken.safetensors" in text and text.count("error:") == 2
    assert cli("a", "a", "--workflow", "workflow.json") == 2
    assert "is the same file as A" in capsys.readouterr().err
    assert cli("a", "b", "--workflow", "workflow.json", "--images", "nowhere") == 2
    assert "is not a folder" in capsys.readouterr().err


def result_of(*levels: float) -> Comparison:
    evaluations = [
        Evaluation({f"{i}": [1.0 + i + level + 0.001 * (i % 3) * n] * 4 for i in range(6)})
        for n, level in enumerate(levels)
    ]
    labels = ("base", "A", "B")
    base, first, second = (Measured(Contender(label), e) for label, e in zip(labels, evaluations, strict=True))
    return Comparison(base, first, second, "images")


def test_which_one_is_better_is_decided_by_the_differences():
    assert result_of(0.5, 0.2, 0.1).better == "B" and result_of(0.5, 0.1, 0.2).better == "A"
    close = result_of(0.5, 0.1, 0.0992)
    assert close.better == "" and "can't be told apart" in close.text()


def test_losses_that_are_not_finite():
    broken = result_of(0.5, 0.1, float("nan"))
    assert (
        broken.better == "" and json.loads(json.dumps(broken.as_json(), allow_nan=False))["loss"]["B"]["mean"] is None
    )
