"""ValidateSampler: prompt libraries in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chroma_trainer.nodes.validate_sampler import Inputs, fingerprint, preflight, settings_of
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Paths, SinkHost

LIBRARY = {"cat face": "a photo of a cat", "night": "a street in 1999"}


@pytest.fixture
def host(tmp_path: Path) -> SinkHost:
    (tmp_path / "input" / "prompts").mkdir(parents=True)
    return SinkHost(Paths(tmp_path / "out", tmp_path / "cache", datasets=(tmp_path / "input",)))


def write(host: SinkHost, text: str) -> Path:
    path = host.paths.datasets[0] / "prompts" / "library.json"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "entry", ["prompts/library.json", ' "prompts\\library.JSON" '.replace("JSON", "json"), "absolute"]
)
def test_the_path_of_a_library_is_read(host, entry):
    path = write(host, "\ufeff" + json.dumps(LIBRARY))
    inputs = Inputs(prompts=str(path) if entry == "absolute" else entry)
    settings = settings_of(inputs, host)
    assert settings.library() == LIBRARY and settings.is_named and preflight(inputs, host) == []
    assert json.loads(settings.prompts) == LIBRARY  # what is recorded holds the prompts, not a path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is not a prompt library; it must be a JSON object of names and prompts"),
        ("{", "'prompts/library.json' starts with { but is not JSON"),
        ('{"a": 5}', "every prompt in a prompt library must be a string; not a string: a"),
        (None, "'prompts/library.json' is not a prompt library; there is no 'library.json' in"),
    ],
)
def test_a_library_at_fault_is_reported_by_check(host, text, message):
    if text is not None:
        write(host, text)
    inputs = Inputs(prompts="prompts/library.json")
    (problem,) = preflight(inputs, host)
    assert problem.field == "prompts" and message in problem.message
    with pytest.raises(UserError):
        settings_of(inputs, host)


def test_an_edited_library_runs_the_node_again(host):
    write(host, json.dumps(LIBRARY))
    values = {"prompts": "prompts/library.json"}
    first = fingerprint(values, host.paths)
    write(host, json.dumps({**LIBRARY, "dog": "a dog"}))
    assert fingerprint(values, host.paths) != first and fingerprint({"prompts": "a cat"}, host.paths) == ""


def test_prompts_with_json_in_them_are_prompts(host):
    settings = settings_of(Inputs(prompts="a screen that shows data.json\nb.json"), host)
    assert list(settings.library()) == ["a screen that shows data.json", "b.json"]
