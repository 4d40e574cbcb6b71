"""Images of a paused run: sampled with the weights as they are, and the run goes on to the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from chroma_trainer.cli import main
from chroma_trainer.nodes.comfyui.run_history import Backlog
from chroma_trainer.nodes.runs import sample_run
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Paths, SinkHost
from chroma_trainer.trainer_core.run_images.drawable import drawable_run, prompts_in
from chroma_trainer.trainer_core.run_images.image_sets import sets_of
from chroma_trainer.trainer_core.run_images.votes import read_vote
from chroma_trainer.trainer_core.runs import layout
from chroma_trainer.trainer_core.runs.control import Status, write_status
from chroma_trainer.trainer_core.runs.run_host import Paused
from chroma_trainer.trainer_core.storage.atomic import sha256_of
from chroma_trainer.trainer_core.train import run as run_module
from PIL import Image

MODELS = ("--models", "models")


def graph() -> dict:
    values = {
        "name": "cat", "rank": 2, "alpha": 2, "steps": 4, "learning_rate": 0.5, "warmup_steps": 0, "eval_images": 0,
        "gradient_checkpointing": False, "checkpoint_every": 1, "validate_every": 0,
    }  # fmt: skip
    prompts = {"prompts": "a cat", "steps": 1, "cfg": 1.0, "resolutions": "32x32"}
    return {
        "1": {"class_type": "LoadChroma", "inputs": {"folder": "tiny-chroma", "dtype": "fp32"}},
        "3": {"class_type": "DatasetBackend", "inputs": {"folder": "images", "resolution": 32, "trigger": "sks"}},
        "4": {"class_type": "ValidateSampler", "inputs": prompts},
        "5": {"class_type": "LoRATrainer", "inputs": {"model": ["1", 0], "dataset": ["3", 0], "validation": ["4", 1], **values}},
    }  # fmt: skip


@pytest.fixture
def cli(tmp_path, tiny_chroma, monkeypatch):
    (tmp_path / "models" / "diffusers").mkdir(parents=True)
    shutil.copytree(tiny_chroma, tmp_path / "models" / "diffusers" / "tiny-chroma")
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32), (200 * i, 30, 60)).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"a cat {i}", encoding="utf-8")
    (tmp_path / "workflow.json").write_text(json.dumps(graph()), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda *arguments: main([*map(str, arguments), *MODELS])
    for number, handler in handlers.items():
        signal.signal(number, handler)


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_paused_run_draws_and_goes_on_to_the_same_bytes(cli, tmp_path, monkeypatch, capsys):
    assert cli("run", "workflow.json", "--output", "whole") == 0
    drawn: list[Path] = []

    def draw_while_paused(folder: Path, host) -> None:
        before = files_of(folder)
        assert cli("draw", "cat", "sks, a cat", "a dog", "--output", "out") == 0
        drawn.extend(folder.glob("drawn/*.png"))
        after = files_of(folder)
        assert {name: after[name] for name in before} == before and len(after) == len(before) + 1

    fit, paused = run_module.fit, []

    def pause_at_2(state, host, hooks):
        def pause(state):
            if state.step == 2 and not paused:
                paused.append(state.step)
                raise Paused(next((tmp_path / "out" / "chroma_trainer").glob("cat-*")))

        fit(state, host, (*hooks, pause))

    monkeypatch.setattr(run_module, "fit", pause_at_2)
    monkeypatch.setattr(run_module, "wait_for_resume", draw_while_paused)
    assert cli("run", "workflow.json", "--output", "out") == 0
    assert sha256_of(tmp_path / "out/loras/cat.safetensors") == sha256_of(tmp_path / "whole/loras/cat.safetensors")
    (grid,) = drawn
    assert grid.name.startswith("step-000002-") and grid.name.endswith("-32x32.png")
    assert str(grid) in capsys.readouterr().out.replace("out/chroma_trainer", str(tmp_path / "out/chroma_trainer"))
    with Image.open(grid) as page:
        assert page.height > 2 * 160  # a row for each prompt
    # After the end the last checkpoint is drawn: other weights, another grid.
    host = SinkHost(
        Paths(
            tmp_path / "out",
            tmp_path / "out/chroma_trainer/cache",
            {"diffusers": (tmp_path / "models/diffusers",)},
            (tmp_path,),
        )
    )
    (images,) = sample_run.run(sample_run.Inputs(run="cat", prompts="sks, a cat\na dog"), host)
    assert images[0].shape[-1] == 3
    last = next(path for path in grid.parent.glob("*.png") if path != grid)
    assert last.name == grid.name.replace("000002", "000004")
    with Image.open(last) as new, Image.open(grid) as old:
        assert np.abs(np.asarray(new, int) - np.asarray(old, int)).max() > 8


def run_folder(output: Path, state: str, checkpoints: int = 1) -> Path:
    folder = output / "chroma_trainer" / "cat-12345678"
    folder.mkdir(parents=True)
    for step in range(checkpoints):
        (folder / "checkpoints" / f"step-00000{step + 1}").mkdir(parents=True)
    write_status(folder, Status(state, step=1, total=4, pid=1 if state == "running" else 0))
    return folder


@pytest.mark.parametrize("state", ["paused", "stopped", "finished", "failed"])
def test_runs_that_can_be_drawn(tmp_path, state):
    folder = run_folder(tmp_path, state)
    assert drawable_run("cat", tmp_path) == folder == drawable_run("cat-12345678", tmp_path)
    first = sample_run.fingerprint({"run": "cat"}, Paths(tmp_path, tmp_path))
    (folder / "checkpoints" / "step-000009").mkdir()
    assert sample_run.fingerprint({"run": "cat"}, Paths(tmp_path, tmp_path)) != first


@pytest.mark.parametrize(
    ("state", "checkpoints", "text"),
    [("running", 1, "pause it first: chroma-trainer pause"), ("paused", 0, "no checkpoint yet")],
)
def test_runs_that_can_not(tmp_path, monkeypatch, state, checkpoints, text):
    from chroma_trainer.trainer_core.runs import control

    monkeypatch.setattr(control, "is_held", lambda folder: True)
    run_folder(tmp_path, state, checkpoints)
    with pytest.raises(UserError, match=text):
        drawable_run("cat", tmp_path)


def test_a_run_of_a_whole_model_has_no_lora_to_draw_with(tmp_path):
    folder = run_folder(tmp_path, "finished")
    (folder / "checkpoints" / "step-000001" / "state.json").write_text("{}", "utf-8")
    with pytest.raises(UserError, match="has no LoRA in its checkpoints, as it trains the whole model"):
        drawable_run("cat", tmp_path)


def test_a_prompt_is_asked_for_in_words_of_the_command(tmp_path, capsys):
    run_folder(tmp_path, "finished")
    assert main(["draw", "cat", "--output", str(tmp_path)]) == 2
    assert "error: PROMPT: is missing; write at least one after the run" in capsys.readouterr().err


def test_all_faults_of_the_node_at_once(tmp_path):
    host = SinkHost(Paths(tmp_path, tmp_path))
    problems = sample_run.preflight(sample_run.Inputs(run="dog", prompts=" \n "), host)
    assert [problem.field for problem in problems] == ["prompts", "run"]
    assert [p.field for p in sample_run.preflight(sample_run.Inputs(run="", prompts="a"), host)] == ["run"]
    with pytest.raises(UserError, match="at most 64"):
        prompts_in([str(i) for i in range(65)])
    assert prompts_in(["a", " a", "", "b"]) == ["a", "b"]


def test_a_workflow_reaches_no_folder_outside_of_the_output(tmp_path):
    folder = run_folder(tmp_path / "elsewhere", "paused")
    output = tmp_path / "output"
    assert drawable_run(str(folder), output) == folder
    (problem,) = sample_run.preflight(sample_run.Inputs(run=str(folder), prompts="a"), SinkHost(Paths(output, output)))
    assert problem.field == "run" and "outside of the output folder" in problem.message


def test_the_page_gets_the_newest_images_first(tmp_path):
    folder = run_folder(tmp_path, "paused")
    (folder / "drawn").mkdir()
    for step, seconds in ((2, 100), (4, 50)):
        path = folder / "drawn" / f"step-00000{step}-abcdef01-32x32.png"
        path.write_bytes(b"png")
        os.utime(path, (seconds, seconds))
    drawn = Backlog(tmp_path).story(folder)["drawn"]
    assert [image["step"] for image in drawn] == [2, 4] and "subfolder=chroma_trainer" in drawn[0]["url"]


def test_images_for_a_vote_and_for_the_slider(cli, tmp_path, capsys):
    """Two checkpoints from the same noise, as the grids show them; the status says how the vote stands."""
    assert cli("run", "workflow.json", "--output", "out") == 0
    run = next((tmp_path / "out" / "chroma_trainer").glob("cat-*"))
    before = files_of(run)
    steps = [layout.step_of(path) for path in layout.list_checkpoints(run / "checkpoints")]
    first, last = steps[0], steps[-1]
    compare = ("draw", "cat", "--output", "out", "--compare", f"{first},{last}", "--seeds", 2)
    assert cli(*compare) == 0
    ((name, images),) = sets_of(run)
    assert [version.label for version in images.versions] == [f"step {first}", f"step {last}"]
    assert [(row.prompt, row.seed, row.size) for row in images.rows] == [("a cat", 0, (32, 32)), ("a cat", 1, (32, 32))]
    folder = run / "image-sets" / name
    pixels = {path.name: np.asarray(Image.open(path), int) for path in folder.glob("*.png")}
    assert sorted(pixels) == ["0000-0.png", "0000-1.png", "0001-0.png", "0001-1.png"]
    assert all(image.shape == (32, 32, 3) for image in pixels.values())
    assert (
        np.abs(pixels["0000-0.png"] - pixels["0000-1.png"]).max()
        > 4
        < np.abs(pixels["0000-0.png"] - pixels["0001-0.png"]).max()
    )
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert cli(*compare) == 0  # nothing is sampled again
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    vote = read_vote(folder)
    assert vote
    vote.with_choice(0, "left").with_choice(1, "equal").save()
    capsys.readouterr()
    assert main(["status", "cat", "--output", "out"]) == 0
    assert "2 of 2 pairs voted" in (text := capsys.readouterr().out) and "can't be told apart yet" in text

    assert cli("draw", "cat", "a dog", "--output", "out", "--strengths", "0,1") == 0
    (strengths,) = (images for name, images in sets_of(run) if name.startswith("strengths"))
    assert [version.strength for version in strengths.versions] == [0, 1] and strengths.step == last
    assert strengths.rows[0].prompt == "a dog"
    assert cli("draw", "cat", "a dog", "--output", "out", "--strengths", "0,1", "--checkpoints", "all") == 0
    sliders = [
        (name, images) for name, images in sets_of(run) if name.startswith("strengths") and len(images.versions) == 4
    ]
    ((name, images),) = sliders
    assert [(version.step, version.strength) for version in images.versions] == [
        (first, 0),
        (first, 1),
        (last, 0),
        (last, 1),
    ]
    columns = [(run / "image-sets" / name / f"0000-{number}.png").read_bytes() for number in range(4)]
    assert columns[0] == columns[2] and len({*columns}) == 3  # the base model is sampled once
    assert cli("draw", "cat", "a dog", "--output", "out", "--strengths", "1", "--checkpoints", "99") == 2
    assert "no checkpoint of step 99" in capsys.readouterr().err
    after = files_of(run)
    assert {name: after[name] for name in before} == before
    for values, message in (
        ((f"{first}",), "a vote is on two"), ((f"{first},{first}",), "choose two versions"), (("99,base",), "no checkpoint of step 99"),
        (("cat,nobody",), "no LoRA 'nobody'"),
    ):  # fmt: skip
        assert cli("draw", "cat", "--output", "out", "--compare", *values) == 2
        assert message in capsys.readouterr().err
    outside = tmp_path / "out" / "other.safetensors"
    shutil.copy(tmp_path / "out" / "loras" / "cat.safetensors", outside)
    assert cli("draw", "cat", "--output", "out", "--compare", f"base,{outside}") == 2
    assert "outside of the output folder" in capsys.readouterr().err


def test_the_node_needs_prompts_for_a_grid_alone():
    assert sample_run.Inputs(run="cat", compare="1, 2").lines() == []
    with pytest.raises(UserError, match="write one prompt per line"):
        sample_run.Inputs(run="cat").lines()
    assert [p.field for p in sample_run.Inputs(run="cat", compare="1, 2", strengths="0, 1").problems()] == ["strengths"]
