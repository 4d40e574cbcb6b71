"""What is published: names in place of paths, no secrets, valid JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.trainer_core.host import ASSETS, Paths, SinkHost
from chroma_trainer.trainer_core.runs.local_values import with_local_values, write_local_values
from chroma_trainer.trainer_core.runs.portable import MAX_DEPTH, is_absolute, portable, portable_path
from chroma_trainer.trainer_core.spec import build_inputs


@pytest.fixture
def paths(tmp_path, monkeypatch) -> Paths:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/alice")
    roots = (Path.cwd(), tmp_path / "data", tmp_path / "data" / "inner")
    models = {"loras": (tmp_path / "models" / "loras",)}
    return Paths(output=tmp_path / "out", cache=tmp_path / "cache", datasets=roots, models=models)


ABSOLUTE = ["/home/alice/cats", "/cats", "~", "~/cats", "~bob/cats", "C:\\Users\\alice\\cats", "c:/cats", "\\\\nas\\alice\\cats",
            "file:///home/alice/cats", ' "C:\\my cats" ', "/data/my cats/red"]  # fmt: skip
OTHER = [
    "cats",
    "cats/red",
    "./cats",
    "../cats",
    "a cat, c: red",
    "/imagine a cat",
    "/",
    "",
    "~5 cats",
    "http://a/b",
    "lodestones/Chroma",
]


@pytest.mark.parametrize("text", ABSOLUTE)
def test_absolute_paths_become_names(paths, text):
    name = portable_path(text, paths)
    assert is_absolute(text) and "alice" not in name and not is_absolute(name) and "/" not in name and "\\" not in name


@pytest.mark.parametrize("text", OTHER)
def test_other_texts_stay(paths, text):
    assert not is_absolute(text) and portable(text, paths) == text


def test_names_are_relative_to_the_nearest_datasets_or_models_folder(paths, tmp_path):
    assert portable_path(f"{tmp_path}/data/animals/cats/", paths) == "animals/cats"
    assert portable_path(f"{tmp_path}/data/inner/cats", paths) == "cats"
    assert portable_path(f"{tmp_path}/models/loras/a/b.safetensors", paths) == "a/b.safetensors"
    assert portable_path(str(ASSETS / "neon-emoji"), paths) == "neon-emoji"
    assert portable_path(f"{tmp_path}/elsewhere/cats", paths) == "cats"  # the working directory is no datasets folder
    assert portable_path(f"{tmp_path}/data", paths) == "data"
    assert portable_path(f"{tmp_path}/database/cats", paths) == "cats"


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_are_followed_where_the_text_does_not_help(paths, tmp_path):
    (tmp_path / "data" / "cats").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert portable_path(f"{tmp_path}/link/cats", paths) == "cats"
    assert portable_path(f"{tmp_path}/link", paths) == "link"


def test_values_of_any_kind(paths):
    value = {
        "prompts": "a cat\n/home/alice/prompts.json\nthe notes in /home/alice/notes", "list": ["/x/cats", 1, None, True],
        "pair": ("/x/cats", 2), "nan": float("nan"), "inf": [float("-inf")], "half": "\ud800", "\udfff": 1,
        "api_key": "abc", "HF_TOKEN": "abc", "text": "use hf_abcdefghijklmnopqrstuvwx now", "max_tokens": "77", "token_count": 5,
    }  # fmt: skip
    result = portable(value, paths)
    assert result == {
        "prompts": "a cat\nprompts.json\nthe notes in ~/notes", "list": ["cats", 1, None, True], "pair": ("cats", 2),
        "nan": None, "inf": [None], "half": "\\ud800", "\\udfff": 1, "api_key": "", "HF_TOKEN": "", "text": "use  now",
        "max_tokens": "77", "token_count": 5,
    }  # fmt: skip
    json.dumps(result, allow_nan=False, ensure_ascii=False).encode()
    assert portable(result, paths) == result
    deep: object = "x"
    for _ in range(MAX_DEPTH + 5):
        deep = [deep]
    assert "x" not in json.dumps(portable(deep, paths))


def test_a_folder_gets_the_same_name_however_it_is_typed(paths, tmp_path, monkeypatch):
    monkeypatch.setenv("CHROMA_TRAINER_ROOTS", str(tmp_path / "far"))
    for folder in ("data/animals/cats", "far/cats"):
        (tmp_path / folder).mkdir(parents=True)
    spec, host = CATALOGUE["DatasetBackend"], SinkHost(paths=paths)

    def name_of(folder: str) -> tuple[str, str]:
        inputs, _ = build_inputs(spec, {"folder": folder, "masks": folder})
        (dataset,) = spec.run(inputs, host)
        assert dataset.parts[0].masks == dataset.parts[0].folder
        return dataset.parts[0].folder, dataset.roots[0]

    root = str(tmp_path / "data" / "animals" / "cats")
    assert name_of(root) == name_of("animals/cats") == ("animals/cats", root)
    assert name_of(str(tmp_path / "far" / "cats")) == ("cats", str(tmp_path / "far" / "cats"))
    assert name_of("./animals/cats")[0] == "./animals/cats"  # a relative one is recorded as it is typed


def test_originals_are_put_back_on_this_machine_unless_they_were_edited(paths, tmp_path):
    workflow = {
        "3": {"class_type": "D", "inputs": {"folder": "/x/cats", "n": 1, "link": ["1", 0], "api_key": "k"}},
        "4": {},
    }
    recorded = portable(workflow, paths)
    assert recorded["3"]["inputs"]["folder"] == "cats"
    write_local_values(tmp_path, workflow, recorded)
    back = with_local_values(recorded, tmp_path)
    assert (
        back["3"]["inputs"] == {**workflow["3"]["inputs"], "api_key": ""}
        and "k" not in (tmp_path / "paths.json").read_text()[-3:]
    )
    recorded["3"]["inputs"]["folder"] = "dogs"
    assert with_local_values(recorded, tmp_path) == recorded


@pytest.mark.parametrize(
    "text", ["", "[]", "5", '{"3": 5}', '{"3": {"folder": 5}}', '{"3": {"folder": {"here": 5}}}', "[" * 9999]
)
def test_damaged_local_values_change_nothing(tmp_path, text):
    (tmp_path / "paths.json").write_text(text)
    for workflow in ({"3": {"inputs": {"folder": "cats"}}}, {"3": {"inputs": 5}}, {"3": 5}, [1], None):
        assert with_local_values(workflow, tmp_path) == workflow
