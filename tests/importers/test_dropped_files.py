"""Configurations dropped on ComfyUI's page: the same workflow as from files, nothing read from the disk, ComfyUI's own files left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.importers.dropped_files import MAX_FILES, import_dropped
from chroma_trainer.trainer_core.importers.engine import import_files
from chroma_trainer.trainer_core.importers.source_files import MAX_BYTES

from tests.importers import examples

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
PROMPTS = "a shrine --w 512 --h 768\n"
DROPS = {
    "SimpleTuner": {"config.json": examples.FLUX_GUIDE, "multidatabackend.json": examples.BACKENDS, "user_prompt_library.json": examples.LIBRARY},
    "OneTrainer": {"chroma.json": examples.ONETRAINER_CHROMA, "concepts.json": examples.ONETRAINER_CONCEPTS},
    "ai-toolkit": {"job.yaml": examples.AI_TOOLKIT},
    "kohya": {"train.sh": examples.FLUX_COMMAND, "data.toml": examples.DATASET_TOML, "prompts.txt": PROMPTS},
    "kohya_ss": {"gui.json": examples.GUI},
    "diffusion-pipe": {"main.toml": examples.PIPE, "dataset.toml": examples.PIPE_DATASET},
}  # fmt: skip


def text_of(content: object) -> str:
    return content if isinstance(content, str) else json.dumps(content)


def drop(contents: dict) -> dict | None:
    entries = [{"name": name, "text": text_of(content)} for name, content in contents.items()]
    return import_dropped(entries, CATALOGUE)


@pytest.mark.parametrize("title", DROPS)
@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_dropped_configuration_is_the_workflow_of_its_files(tmp_path: Path, title: str, is_reversed: bool):
    contents = DROPS[title]
    for name, content in contents.items():
        (tmp_path / name).write_text(text_of(content), "utf-8")
    expected = import_files([tmp_path / name for name in contents], CATALOGUE)
    dropped = drop(dict(reversed(contents.items())) if is_reversed else contents)
    report = expected.report.as_json()
    main = next(iter(contents))
    assert dropped == {"trainer": title, "file": main, "workflow": expected.workflow, "report": report}


@pytest.mark.parametrize(
    "contents",
    [
        {"first-lora.json": (WORKFLOWS / "first-lora.json").read_text("utf-8")},
        {"first-lora.json": (WORKFLOWS / "api" / "first-lora.json").read_text("utf-8")},
        {"multidatabackend.json": examples.BACKENDS},
        {"broken.json": "{"},
        {"other.yaml": "a: 1\n"},
        {"readme.txt": "a text --with --options\n"},
        {"environment.env": "A=1\n"},
        {},
    ],
    ids=str,
)
def test_what_is_no_trainers_configuration_is_left_to_comfyui(contents: dict):
    assert drop(contents) is None


def test_files_that_are_named_but_not_dropped_are_not_read_from_the_disk(tmp_path, monkeypatch):
    for name, content in DROPS["SimpleTuner"].items():
        (tmp_path / name).write_text(text_of(content), "utf-8")
    (tmp_path / "prompts.txt").write_text(PROMPTS, "utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"together with config\.json") as caught:
        drop({"config.json": examples.FLUX_GUIDE})
    assert [problem.field for problem in caught.value.problems] == [
        "config.json: user_prompt_library",
        "config.json: data_backend_config",
    ]
    secret = {**examples.FLUX_GUIDE, "--data_backend_config": str(tmp_path / "multidatabackend.json")}
    with pytest.raises(UserError, match="drop that file as well"):
        drop({"config.json": secret})
    kohya = drop({name: DROPS["kohya"][name] for name in ("train.sh", "data.toml")})
    assert kohya and any(line["option"] == "sample_prompts" for line in kohya["report"]["missing"])


def test_errors_name_the_file():
    with pytest.raises(UserError, match=r"job\.yaml: is not valid YAML"):
        drop({"job.yaml": "config: [\n"})
    with pytest.raises(UserError, match=r"data\.toml: is not valid TOML"):
        drop({"train.sh": examples.FLUX_COMMAND, "data.toml": "= 3"})
    with pytest.raises(UserError, match=r"other\.json: is not part of the ai-toolkit configuration in job\.yaml"):
        drop({"job.yaml": examples.AI_TOOLKIT, "other.json": "{}"})
    with pytest.raises(UserError, match=r"job\.yaml: is larger than"):
        drop({"job.yaml": "a" * (MAX_BYTES + 1)})
    with pytest.raises(UserError, match="more than 16 files"):
        drop({f"{i}.json": "{}" for i in range(MAX_FILES + 1)})
    for entry in (None, 3, {}, {"name": "a"}, {"name": 1, "text": "{}"}):
        with pytest.raises(UserError, match="a dropped file is not"):
            import_dropped([entry], CATALOGUE)
