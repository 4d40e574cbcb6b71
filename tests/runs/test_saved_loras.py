"""No LoRA of another run is lost when a run saves one of the same name."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from chroma_trainer.trainer_core.host import Notice, Paths, SinkHost
from chroma_trainer.trainer_core.runs.saved_loras import keep_other_lora
from chroma_trainer.trainer_core.storage.atomic import sha256_of

from tests.narrowing import of_type


@pytest.fixture
def place(tmp_path):
    """Two runs of one name, and the functions of this test: save(run, text), and the files that are there."""
    notices, loras = [], tmp_path / "loras"
    host = SinkHost(
        paths=Paths(output=tmp_path, cache=tmp_path), sinks=(lambda event: notices.append(of_type(event, Notice).text),)
    )
    loras.mkdir()

    def save(run, text, path=loras / "mine.safetensors"):
        folder = tmp_path / "chroma_trainer" / run
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "world.json").touch()
        with keep_other_lora(path, folder, host):
            path.write_text(text) if not path.exists() else _replace(path, text)
        with (folder / "events.jsonl").open("a") as events:
            events.write(json.dumps({"kind": "LoraSaved", "path": str(path), "sha256": sha256_of(path)}) + "\n")

    def files():
        return {path.name: path.read_text() for path in loras.iterdir()}

    return SimpleNamespace(save=save, files=files, notices=notices, loras=loras, host=host, folder=tmp_path)


def _replace(path, text):
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def test_a_run_replaces_its_own(place):
    place.save("mine-aaaaaaaa", "one")
    place.save("mine-aaaaaaaa", "two")
    assert place.files() == {"mine.safetensors": "two"} and place.notices == []


def test_another_runs_lora_gets_the_name_of_its_run(place):
    place.save("mine-aaaaaaaa", "one")
    place.save("mine-bbbbbbbb", "two")
    assert place.files() == {"mine.safetensors": "two", "mine-aaaaaaaa.safetensors": "one"}
    assert place.notices == ["mine.safetensors was saved by another run; that file is now mine-aaaaaaaa.safetensors"]
    place.save("mine-aaaaaaaa", "three")
    place.save("mine-bbbbbbbb", "two")
    assert place.files() == {
        "mine.safetensors": "two",
        "mine-aaaaaaaa.safetensors": "three",
        "mine-bbbbbbbb.safetensors": "two",
    }


def test_files_of_no_run_are_numbered(place):
    (place.loras / "mine.safetensors").write_text("downloaded")
    (place.loras / "mine-2.safetensors").write_text("another")
    place.save("mine-aaaaaaaa", "one")
    assert place.files() == {
        "mine.safetensors": "one",
        "mine-2.safetensors": "another",
        "mine-3.safetensors": "downloaded",
    }


def test_equal_bytes_are_saved_once(place):
    place.save("mine-aaaaaaaa", "one")
    place.save("mine-bbbbbbbb", "one")
    assert place.files() == {"mine.safetensors": "one"} and place.notices == []


def test_a_failed_export_leaves_the_one_file(place):
    place.save("mine-aaaaaaaa", "one")
    with (
        pytest.raises(OSError),
        keep_other_lora(place.loras / "mine.safetensors", place.folder / "mine-bbbbbbbb", place.host),
    ):
        raise OSError("full")
    assert place.files() == {"mine.safetensors": "one"} and place.notices == []
