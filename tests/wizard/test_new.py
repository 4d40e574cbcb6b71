"""`chroma-trainer new` as a user meets it: lines typed or piped, files written, exit status."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.cli import main
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.host import ASSETS
from chroma_trainer.trainer_core.wizard import new_command
from chroma_trainer.trainer_core.wizard.card import Card
from chroma_trainer.trainer_core.workflow.graph import Graph, Link
from chroma_trainer.trainer_core.workflow.read import read_workflow
from PIL import Image

New = Callable[..., int]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with my-dog: three images of 1100 x 1000, one of them with a caption."""
    folder = tmp_path / "my-dog"
    folder.mkdir()
    for name, color in (("brown dog_01", "brown"), ("dog in the snow_02", "white"), ("IMG_0003", "black")):
        Image.new("RGB", (1100, 1000), color).save(folder / f"{name}.png")
    (folder / "IMG_0003.txt").write_text("a black dog", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(new_command, "detect_card", Card)
    return tmp_path


@pytest.fixture
def new(home: Path, monkeypatch: pytest.MonkeyPatch) -> New:
    """new("--yes", lines="...") in the working folder."""

    def call(*arguments: str, lines: str | None = None) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines or ""))
        return main(["new", *arguments])

    return call


def values(graph: Graph, kind: str) -> dict[str, Any]:
    (node,) = [node for node in graph.nodes.values() if node.type == kind]
    return {name: value for name, value in node.inputs.items() if not isinstance(value, Link)}


def test_all_defaults(new: New, home: Path, capsys: pytest.CaptureFixture):
    assert new("--yes") == 0
    printed = capsys.readouterr().out
    assert "my-dog: 3 images, 1100 x 1000 pixels, 2 without a caption" in printed
    assert "workflow.json: no problems" in printed and "plan: fits" in printed
    assert printed.endswith("next: chroma-trainer run workflow.json\n")
    graph = read_workflow(home / "workflow.json", schemas())
    assert values(graph, "LoadChroma")["flavour"] == "nano"  # no accelerator, no files
    folder = values(graph, "DatasetBackend")
    assert (folder["folder"], folder["captions"], folder["trigger"]) == ("my-dog", "filename", "mydogx")
    assert values(graph, "LoRATrainer")["name"] == "my-dog"


@pytest.mark.parametrize("flavor", ["nano", pytest.param("krea", marks=pytest.mark.slow)])
def test_every_answer_wrong_once(new: New, home: Path, capsys: pytest.CaptureFixture, flavor: str):
    """The plan of krea, with 12 billion weights, takes seconds. nano fits every card, so the card is not asked for."""
    card = ["lots", "16 GB"] if flavor == "krea" else []
    lines = [
        "hdd", {"krea": "2", "nano": "3"}[flavor],
        "my-dogs", "my-dog",
        "4", "trigger",
        "cat", "subj",
        "none", "zwx",
        *card,
        "perfect", "3",  # best
        "a:b", "dogs/zwx",
    ]  # fmt: skip
    assert new(lines="\n".join(lines)) == 0
    printed = capsys.readouterr().out
    assert "Other flavors can be typed: base, flash, dev, schnell, fluxbooru, libreflux.\n" in printed
    for reason in (
        "'hdd' is not one of hd, krea, nano, base",
        "'my-dogs' is not a folder here; did you mean 'my-dog'?",
        "'4' is not one of textfile, filename, trigger",
        "'cat' is not one of style, subject, character",
        "is empty, but the captions are the trigger alone; write a made-up word",
        "'perfect' is not one of quick, good, best",
        "'a:b' is not a valid file name on every system",
    ):
        assert f"  {reason}" in printed
    assert ("  'lots' is not a number of GB from 0 to 1024; write for example 12" in printed) == bool(card)
    assert printed.count(" [") == len(lines)  # prompts
    assert "plan: " in printed
    graph = read_workflow(home / "workflow.json", schemas())
    if flavor == "krea":
        assert values(graph, "LoadFlux")["flavour"] == "krea" and values(graph, "LoadFlux")["assistant"] == "by flavour"
    else:
        assert values(graph, "LoadChroma")["flavour"] == "nano"
    folder = values(graph, "DatasetBackend")
    assert (folder["captions"], folder["instance_prompt"]) == ("instance prompt", "zwx")
    assert values(graph, "LoRATrainer")["name"] == "dogs/zwx"


OPTIONS = {
    "--model": "hd", "--images": "my-dog", "--captions": "filename", "--learn": "character", "--trigger": "zwx",
    "--vram": "12", "--quality": "quick", "--name": "zwx",
}  # fmt: skip


@pytest.mark.slow
def test_options_answer_all_questions(new: New, home: Path, capsys: pytest.CaptureFixture):
    assert new(*(word for option in OPTIONS.items() for word in option), "-o", "own.json") == 0
    printed = capsys.readouterr().out
    assert "?" not in printed and "of 12.9 GB free" in printed  # the plan is for the card
    assert values(read_workflow(home / "own.json", schemas()), "LoRATrainer")["name"] == "zwx"


@pytest.mark.parametrize("missing", OPTIONS)
def test_the_end_of_the_input_is_no_answer(new: New, home: Path, capsys: pytest.CaptureFixture, missing: str):
    assert new(*(word for option in OPTIONS.items() if option[0] != missing for word in option)) == 130
    error = capsys.readouterr().err
    assert f"error: {missing}: the input ended; answer with {missing}, or take all defaults with --yes" in error
    assert [path.name for path in home.iterdir()] == ["my-dog"]


def test_an_interrupt_writes_nothing(new: New, home: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert new() == 130 and [path.name for path in home.iterdir()] == ["my-dog"]


def test_wrong_options_are_listed_together(new: New, home: Path, capsys: pytest.CaptureFixture):
    (home / "text").write_text("", "utf-8")
    wrong = {
        "--family": "sdxl", "--images": "nowhere", "--captions": "json", "--learn": "all", "--trigger": "x" * 101,
        "--vram": "-1", "--quality": "max", "--name": "con", "--output": "flow.yaml",
    }  # fmt: skip
    assert new(*(f"{option}={value}" for option, value in wrong.items())) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(wrong)
    assert all(any(line.startswith(f"error: {option}: ") for line in lines) for option in wrong)


def test_captions_that_are_not_there(new: New, home: Path, capsys: pytest.CaptureFixture):
    (home / "my-dog" / "IMG_0003.txt").unlink()
    assert new("--yes", "--images", "my-dog", "--captions", "textfile") == 2
    assert "no image has a caption file, so use filename or trigger" in capsys.readouterr().err


def test_an_existing_file_is_not_replaced(new: New, home: Path, capsys: pytest.CaptureFixture):
    (home / "workflow.json").write_text("mine", "utf-8")
    nano = ("--family", "nano", "--images", "my-dog")
    assert new("--yes", "-o", "workflow.json", *nano) == 2
    assert "'workflow.json' exists already; use another name, or --force" in capsys.readouterr().err
    assert new("--yes", *nano) == 0
    assert (home / "workflow.json").read_text("utf-8") == "mine" and (home / "workflow-2.json").is_file()
    given = (*nano, "--captions", "filename", "--learn", "style", "--trigger", "t", "--quality", "good", "--name", "n")
    assert new(*given, lines="workflow-2.json\nthird.json\n") == 0
    assert (
        "'workflow-2.json' exists already; write another name, or yes to replace workflow.json"
        in capsys.readouterr().out
    )
    assert (home / "third.json").is_file() and (home / "workflow.json").read_text("utf-8") == "mine"
    assert new(*given, lines="yes\n") == 0 and json.loads((home / "workflow.json").read_text("utf-8"))["nodes"]


def test_a_folder_elsewhere_is_named_by_an_option(
    new: New, home: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture
):
    elsewhere = tmp_path_factory.mktemp("else where")
    shutil.copytree(home / "my-dog", elsewhere / "dogs")
    assert new("--yes", "--family", "nano", "--images", str(elsewhere / "dogs")) == 0
    assert f"next: chroma-trainer run workflow.json --datasets '{elsewhere}'" in capsys.readouterr().out
    folder = values(read_workflow(home / "workflow.json", schemas()), "DatasetBackend")
    assert folder["folder"] == "dogs"
    note = json.loads((home / "workflow.json").read_text("utf-8"))["nodes"][0]["widgets_values"][0]
    assert "put the folder *dogs* into *input*" in note and str(elsewhere) not in note


@pytest.mark.slow
def test_the_card_is_asked_of_the_device(new: New, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(new_command, "detect_card", lambda: Card("Card X", 24.0))
    assert new("--yes", "--images", "my-dog") == 0
    printed = capsys.readouterr().out
    assert "model: hd" in printed and "Card X: 24 GB" in printed and "vram:" not in printed


def test_damaged_images_are_counted_and_none_left_is_an_error(new: New, home: Path, capsys: pytest.CaptureFixture):
    bad = home / "bad"
    bad.mkdir()
    (bad / "a.png").write_bytes(b"no image")
    assert new("--yes", "--images", "bad") == 2
    assert "none of 1 images in 'bad' can be used, such as" in capsys.readouterr().err
    shutil.copy(ASSETS / "neon-emoji" / "taxi.png", bad / "b.png")
    assert new("--yes", "--images", "bad", "--family", "nano") == 0
    assert "bad: 1 image, 64 x 64 pixels, no captions; 1 can't be used, such as" in capsys.readouterr().out
    assert str(home) not in (home / "workflow.json").read_text("utf-8")


def test_the_working_folder_itself(
    new: New, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(home / "my-dog")
    assert new("--yes", "--family", "nano", "--images", ".") == 0
    assert f"next: chroma-trainer run workflow.json --datasets {home}" in capsys.readouterr().out


def test_a_trigger_that_all_captions_begin_with_is_the_default(new: New, home: Path, capsys: pytest.CaptureFixture):
    folder = home / "mine"
    folder.mkdir()
    for number, text in enumerate(("zwx style, a cat", "zwx style, a dog")):
        shutil.copy(ASSETS / "neon-emoji" / "taxi.png", folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(text, "utf-8")
    assert new("--yes", "--family", "nano", "--images", "mine") == 0
    assert "trigger: zwx style" in capsys.readouterr().out
    (folder / "1.txt").write_text("a dog", "utf-8")
    assert new("--yes", "--family", "nano", "--images", "mine") == 0
    assert "trigger: minex" in capsys.readouterr().out


def test_the_workflow_trains(new: New, home: Path):
    assert new("--yes", "--family", "nano", "--images", "neon-emoji", "--name", "first") == 0
    short = [
        "LoRATrainer.steps=2",
        "LoRATrainer.warmup_steps=0",
        "LoRATrainer.eval_images=0",
        "ValidateSampler.steps=1",
        "ValidateSampler.resolutions=64x64",
    ]
    arguments = ["run", "workflow.json", "--output", "out", "--device", "cpu"]
    assert main([*arguments, *(word for value in short for word in ("--set", value))]) == 0
    assert (home / "out" / "loras" / "first.safetensors").is_file()


def test_captions_in_another_form_are_told(new: New, home: Path, capsys: pytest.CaptureFixture):
    (home / "my-dog" / "IMG_0003.txt").unlink()
    (home / "my-dog" / "metadata.jsonl").write_text('{"file_name": "IMG_0003.png", "text": "a dog"}', "utf-8")
    assert new("--yes") == 0
    assert "no captions (metadata.jsonl lies there: set captions to 'table' to use it" in capsys.readouterr().out
