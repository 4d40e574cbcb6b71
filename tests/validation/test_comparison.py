"""Which states of a LoRA are drawn, and how they are laid out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from chroma_trainer.trainer_core.config.model import ModelConfig
from chroma_trainer.trainer_core.config.request import TrainedLora
from chroma_trainer.trainer_core.config.validation import CheckpointChoice, ValidationConfig
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.flow.adaptive_guidance import AdaptiveGuidance
from chroma_trainer.trainer_core.validation.comparison import Drawn, Version, grids_of, singles_of, versions_of
from chroma_trainer.trainer_core.validation.sample_images import guidance_of

MODEL = ModelConfig(family="chroma", flavour="nano", repo="chroma-nano")
NO_FILE = Path("none.safetensors")  # what is laid out is not read


def settings(**fields):
    return ValidationConfig(**{"prompts": "cat\ndog", "resolutions": "32x32, 32x48", **fields})


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("", CheckpointChoice()),
        ("all", CheckpointChoice(every=True)),
        ("Last 3", CheckpointChoice(last=3)),
        ("last", CheckpointChoice(last=1)),
        ("500, 1000", CheckpointChoice(steps=(500, 1000))),
    ],
)
def test_choices_are_read(text, choice):
    assert settings(checkpoints=text).checkpoint_choice() == choice


@pytest.mark.parametrize("text", ["first", "last 0", "last -1", "5..9", "1,x"])
def test_other_words_are_faults_of_the_field(text):
    (problem,) = settings(checkpoints=text).problems()
    assert problem.field == "checkpoints" and "all, last 3, or steps" in problem.message


def test_picking_from_what_there_is():
    there = [300, 100, 200]
    assert CheckpointChoice(every=True).pick(there) == [100, 200, 300]
    assert CheckpointChoice(last=2).pick(there) == [200, 300]
    assert CheckpointChoice(last=9).pick(there) == [100, 200, 300]
    assert CheckpointChoice(steps=(300, 100, 100)).pick(there) == [100, 300]
    with pytest.raises(UserError, match=r"no checkpoint of step 150; available: 100, 200, 300"):
        CheckpointChoice(steps=(150, 200)).pick(there)
    with pytest.raises(UserError, match="available: none"):
        CheckpointChoice(every=True).pick([])


def test_versions_come_from_the_runs_folder(tmp_path):
    for step in (20, 9, 100):
        (tmp_path / "checkpoints" / f"step-{step:06}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:06}" / "lora.safetensors").touch()
    (tmp_path / "checkpoints" / "step-000050").mkdir()  # of a version that wrote none
    lora = TrainedLora("x.safetensors", "x.safetensors", "", MODEL, str(tmp_path))
    assert [version.label for version in versions_of(lora, settings(checkpoints="all"))] == [
        "step 9",
        "step 20",
        "step 100",
    ]
    assert [version.label for version in versions_of(lora, settings())] == [""]
    stray = TrainedLora("x.safetensors", "x.safetensors", "", MODEL)
    with pytest.raises(UserError, match="has no run folder"):
        versions_of(stray, settings(checkpoints="all"))


def drawn(versions, strengths):
    """Every picture in a grey of its own."""
    shades = iter(range(1, 200))

    def pictures():
        return {
            (w, h): [np.full((h, w, 3), next(shades), np.uint8) for _ in ("cat", "dog")]
            for w, h in ((32, 32), (32, 48))
        }

    places = [(None, 0.0), *((version, strength) for version in versions for strength in strengths)]
    return [Drawn(version, strength, pictures()) for version, strength in places]


def shades_of(page):
    return set(np.unique(np.asarray(page)[..., 0].ravel()).tolist())


def test_one_strength_gives_a_row_a_prompt_and_a_column_a_checkpoint():
    versions = [Version(f"step {s}", NO_FILE) for s in (1, 2, 3)]
    found = drawn(versions, [1.0])
    grids = grids_of(found, settings(), "name")
    assert [(grid.size, grid.label) for grid in grids] == [((32, 32), ""), ((32, 48), "")]
    for grid in grids:
        wanted = {int(p[0, 0, 0]) for item in found for p in item.pictures[grid.size]}
        assert wanted <= shades_of(grid.page)


def test_checkpoints_by_strengths_give_a_grid_a_prompt():
    versions = [Version(f"step {s}", NO_FILE) for s in (1, 2)]
    found = drawn(versions, [0.5, 1.0])
    grids = grids_of(found, settings(), "name")
    assert [(grid.size, grid.label) for grid in grids] == [
        ((32, 32), "cat"), ((32, 32), "dog"), ((32, 48), "cat"), ((32, 48), "dog"),
    ]  # fmt: skip
    for grid in grids:
        row = ["cat", "dog"].index(grid.label)
        wanted = {int(item.pictures[grid.size][row][0, 0, 0]) for item in found}
        assert len(wanted) == 5 and wanted <= shades_of(grid.page)


def test_single_pictures_carry_labels():
    found = drawn([Version("step 7", NO_FILE)], [1.0])
    labels = [label for label, _ in singles_of(found, settings())]
    assert labels[0] == "base, cat, 32x32" and labels[-1] == "step 7 LoRA 1, dog, 32x48" and len(labels) == 8


def test_adaptive_guidance_takes_the_fields():
    assert guidance_of(settings()) is None
    fields = {"threshold": 0.9, "uncond_zero_scale": 0.5, "cfg_start_pct": 0.1, "initial_disabled_steps": 2}
    assert guidance_of(settings(guidance="adaptive", cfg=4.0, **fields)) == AdaptiveGuidance(cfg=4.0, **fields)
