"""Mutated configurations: a workflow that can be read and has no problems in its values, or one clear error.

CHROMA_TRAINER_FUZZ is the number of files (default: 300; 500 were tried), CHROMA_TRAINER_FUZZ_SEED the first seed.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.cli import main
from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.errors import UNPRINTABLE
from chroma_trainer.trainer_core.host import SinkHost
from chroma_trainer.trainer_core.paths import local_paths
from chroma_trainer.trainer_core.workflow.check import check
from chroma_trainer.trainer_core.workflow.read import read_workflow

from tests.importers import examples

NUM_FILES = int(os.environ.get("CHROMA_TRAINER_FUZZ", "300"))
FIRST_SEED = int(os.environ.get("CHROMA_TRAINER_FUZZ_SEED", "0"))
VALUES = [
    None, True, False, 0, 1, -1, 0.5, 1e300, -(10**30), 10**400, "", " ", "a", "true", "1e-4", "512,768", "1024x1024", "x" * 300, "猫", "\x1b[2J", "\ud800",
    "../../etc/passwd", "/dev/zero", "{", "null", [], [1, "2"], [[1]], {}, {"a": {"b": []}}, [{}], "nan", "inf", "\0", "9" * 5000, "[trigger]", "*", "a.b=c d",
]  # fmt: skip
FORMS = {
    "config/config.json": examples.FLUX_GUIDE, "chroma.json": examples.ONETRAINER_CHROMA, "gui.json": examples.GUI, "job.yaml": examples.AI_TOOLKIT,
    "main.toml": examples.PIPE, "train.sh": examples.FLUX_COMMAND, "config/multidatabackend.json": examples.BACKENDS, "concepts.json": examples.ONETRAINER_CONCEPTS,
    "data.toml": examples.DATASET_TOML, "dataset.toml": examples.PIPE_DATASET,
}  # fmt: skip
MAIN = {
    "config/multidatabackend.json": "config/config.json", "concepts.json": "chroma.json", "data.toml": "train.sh", "dataset.toml": "main.toml",
}  # fmt: skip


def mutate_value(rng: random.Random, value: Any) -> Any:
    """The value with some of its entries replaced, removed, renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = value
        while isinstance(place, dict | list) and place:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
                place = place[key]
                continue
            action: Callable[[], Any] = rng.choice(
                [
                    lambda place=place, key=key: place.__setitem__(key, rng.choice(VALUES)),
                    lambda place=place, key=key: place.__setitem__(key, rng.choice(VALUES)),
                    lambda place=place, key=key: place.pop(key),
                    lambda place=place: (
                        place.__setitem__(rng.choice(["x", "--y", "", "\x1b"]), 1)
                        if isinstance(place, dict)
                        else place.append(None)
                    ),
                ]
            )
            action()
            break
    return value


def mutate_text(rng: random.Random, text: str) -> str:
    """The text with some characters or lines replaced, repeated or cut."""
    for _ in range(rng.choice([1, 2, 4])):
        lines = text.splitlines(keepends=True)
        i = rng.randrange(len(lines)) if lines else 0
        word = str(rng.choice(VALUES)).replace("\ud800", "?")
        kind = rng.randrange(5)
        if kind == 0 and lines:
            lines[i] = lines[i][: rng.randrange(len(lines[i]) + 1)] + word + "\n"
        elif kind == 1 and lines:
            del lines[i]
        elif kind == 2 and lines:
            name, separator, rest = lines[i].partition(rng.choice("=: "))
            lines[i] = f"{name}{separator}{word}{rest[-2:]}"
        elif kind == 3:
            place = rng.randrange(len(text) + 1)
            lines = [text[:place] + rng.choice("'\"[]{}=\n\\ -#:,&*!") + text[place:]]
        else:
            lines = [text[: rng.randrange(len(text) + 1)]]
        text = "".join(lines)
    return text


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


@pytest.mark.parametrize("name", FORMS)
def test_a_mutated_file_is_a_workflow_or_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture, name: str):
    statuses = []
    write(tmp_path / "config" / "user_prompt_library.json", examples.LIBRARY)
    write(tmp_path / "prompts.txt", "a cat --w 512 --h 512\n")
    for other, content in FORMS.items():
        write(tmp_path / other, content)
    main_file = tmp_path / MAIN.get(name, name)
    extra = [str(tmp_path / "concepts.json")] if main_file.name == "chroma.json" else []
    for seed in range(FIRST_SEED, FIRST_SEED + NUM_FILES // len(FORMS)):
        rng, content = random.Random(f"{name} {seed}"), FORMS[name]
        text = content if isinstance(content, str) else json.dumps(mutate_value(rng, content))
        write(tmp_path / name, mutate_text(rng, text) if isinstance(content, str) or rng.random() < 0.2 else text)
        output = tmp_path / "workflow.json"
        try:
            status = main(["import", str(main_file), *extra, "-o", str(output), "--force"])
        except Exception as error:
            raise AssertionError(f"{name} {seed}") from error
        out, err = capsys.readouterr()
        assert status in (0, 2) and (status == 0 or err.startswith("error: ")), f"{name} {seed}: {status}"
        assert not UNPRINTABLE.search((out + err).replace("\n", "")), f"{name} {seed}: control characters"
        if status == 0:
            problems = check(
                read_workflow(output, schemas()), CATALOGUE, SinkHost(paths=local_paths([], tmp_path, [], None))
            )
            wrong = [problem for problem in problems if problem.field not in FILES]
            assert not wrong, f"{name} {seed}: {wrong}"
        statuses.append(status)
    assert len(set(statuses)) > 1 or len(statuses) < 10, "these files have only one ending"


# Folders and model files that are not on this machine.
FILES = (
    "folder",
    "diffusion_model",
    "t5",
    "text_encoder",
    "clip",
    "vae",
    "masks",
    "references",
    "init_lora",
    "assistant",
)
