"""The values of a first workflow, written by hand from the pages that they come from."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.wizard import recipes
from chroma_trainer.trainer_core.wizard.choices import LEARN, QUALITIES
from chroma_trainer.trainer_core.wizard.first_workflow import workflow_of
from chroma_trainer.trainer_core.wizard.image_folder import ImageFolder
from chroma_trainer.trainer_core.wizard.interview import Answers
from chroma_trainer.trainer_core.wizard.model_offers import Offer
from chroma_trainer.trainer_core.wizard.recipes import PROMPTS, prompts_of, recipe_of
from chroma_trainer.trainer_core.workflow.graph import Link
from chroma_trainer.trainer_core.workflow.read import graph_from_json

CHROMA, FLUX, NANO = (
    Offer(key, family, key, "") for key, family in (("hd", "chroma"), ("krea", "flux"), ("nano", "nano"))
)
IMAGES = ImageFolder("mine", Path("mine"), None, [(1024, 1024)] * 30, num_captioned=30)
ANSWERS = Answers(CHROMA, IMAGES, "textfile", "style", "zwx", 24.0, "good", "mine")


def test_the_workflow_of_a_style(tmp_path: Path):
    graph = graph_from_json(workflow_of(ANSWERS, CATALOGUE), schemas())
    nodes: dict[str, dict[str, Any]] = {
        node.type: {name: value for name, value in node.inputs.items() if not isinstance(value, Link)}
        for node in graph.nodes.values()
    }
    assert {"flavour": "hd", "dtype": "bf16"}.items() <= nodes["LoadChroma"].items()
    assert nodes["QuantizeModel"]["level"] == "auto"
    assert {"folder": "mine", "trigger": "zwx", "resolution": 1024, "captions": "textfile"}.items() <= nodes[
        "DatasetBackend"
    ].items()
    assert {"resolutions": "1024x1024", "sampling": "by model"}.items() <= nodes["ValidateSampler"].items()
    assert {
        "name": "mine", "rank": 16, "alpha": 0.0, "steps": 1500, "batch_size": 1, "learning_rate": 2e-4,
        "lr_schedule": "constant", "targets": "all", "gradient_checkpointing": True, "sigma_density": "chroma",
        "checkpoint_every": 375, "validate_every": 375,
    }.items() <= nodes["LoRATrainer"].items()  # fmt: skip
    links = {
        (link.node, name)
        for node in graph.nodes.values()
        for name, link in node.inputs.items()
        if isinstance(link, Link)
    }
    assert {name for _, name in links} == {"model", "dataset", "validation"}


@pytest.mark.parametrize(
    "model, learn, quality, images, edge, vram, expected",
    [
        # rank, learning rate, steps, resolution, schedule, density
        (CHROMA, "style", "quick", 30, 1024, 24, (8, 3e-4, 750, 512, "constant", "chroma")),
        (CHROMA, "style", "good", 10, 1024, 16, (16, 2e-4, 1000, 1024, "constant", "chroma")),
        (CHROMA, "style", "good", 30, 1024, 12, (16, 2e-4, 1500, 512, "constant", "chroma")),
        (CHROMA, "style", "good", 200, 1024, 24, (16, 2e-4, 3000, 1024, "constant", "chroma")),
        (CHROMA, "style", "best", 40, 1024, 12, (32, 1e-4, 3000, 1024, "cosine", "chroma")),
        (CHROMA, "style", "best", 100, 500, 24, (32, 1e-4, 4000, 512, "cosine", "chroma")),
        (FLUX, "style", "good", 30, 1024, 16, (16, 2e-4, 1500, 1024, "constant", "logit-normal")),
        (FLUX, "subject", "good", 60, 1024, 24, (16, 2e-4, 2000, 1024, "constant", "logit-normal")),
        (FLUX, "character", "best", 60, 1024, 24, (16, 1e-4, 3000, 1024, "cosine", "logit-normal")),
        (CHROMA, "subject", "quick", 60, 1024, 24, (8, 3e-4, 1000, 512, "constant", "chroma")),
        (CHROMA, "style", "good", 30, 1024, 0, (16, 2e-4, 1500, 512, "constant", "chroma")),
        (NANO, "style", "quick", 28, 64, 0, (16, 3e-3, 250, 64, "cosine", "chroma")),
        (NANO, "subject", "good", 28, 64, 0, (16, 3e-3, 900, 64, "cosine", "chroma")),
        (NANO, "style", "best", 28, 64, 24, (16, 3e-3, 1350, 64, "cosine", "chroma")),
    ],
)
def test_values(model: Offer, learn: str, quality: str, images: int, edge: float, vram: float, expected: tuple):
    recipe = recipe_of(model, learn, quality, images, edge, vram)
    training = {name: item.value for name, item in recipe.training.items()}
    names = ("rank", "learning_rate", "steps", "lr_schedule", "sigma_density")
    rank, rate, steps, schedule, density = (training[name] for name in names)
    assert (rank, rate, steps, recipe.resolution.value, schedule, density) == expected
    assert training["batch_size"] == (6 if model is NANO else 1)
    assert recipe.dtype.value == ("fp32" if model is NANO else "bf16")


def test_the_values_of_nano_are_those_of_the_template_that_they_name():
    template = json.loads((Path(recipes.__file__).parents[2] / "workflows" / "api" / "first-lora.json").read_text())
    (trainer,) = [node["inputs"] for node in template.values() if node["class_type"] == "LoRATrainer"]
    assert {name: value.value for name, value in recipes.NANO.items()} == {name: trainer[name] for name in recipes.NANO}
    assert recipes.NANO_STEPS["good"] == trainer["steps"]


def test_only_images_with_captions_count():
    some = replace(ANSWERS, images=replace(IMAGES, num_captioned=25))
    assert some.num_trained == 25 and replace(some, captions="filename").num_trained == 30


@pytest.mark.parametrize("learn", LEARN)
def test_prompts_with_and_without_the_trigger(learn: str):
    with_it = prompts_of(learn, "zwx")
    assert [("zwx" in text) for text in with_it.values()] == [True, True, False]
    assert not any("," in text[:1] or "{" in text for text in prompts_of(learn, "").values())


def test_every_reason_names_a_page_that_exists_or_is_chosen():
    root = Path(recipes.__file__).parents[2]
    for model in (CHROMA, FLUX, NANO):
        for learn in LEARN:
            for quality in QUALITIES:
                for name, value in recipes.reasons(recipe_of(model, learn, quality, 30, 1024, 24)):
                    pages = re.findall(r"docs/[\w.-]+", value.why)
                    assert value.why and all((root / page).is_file() for page in pages), (name, value.why)
    assert set(PROMPTS) == set(LEARN)
