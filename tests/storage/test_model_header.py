"""Headers of model files are parsed once, as long as the file stays the same."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from chroma_trainer.trainer_core.storage import model_header
from chroma_trainer.trainer_core.storage.model_header import model_header_of
from safetensors.numpy import save_file


@pytest.fixture(autouse=True)
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files whose headers were parsed, none of which counts as one that is being written."""
    names: list[str] = []
    parse = model_header.header_of
    monkeypatch.setattr(model_header, "SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(model_header, "_headers", OrderedDict())
    monkeypatch.setattr(model_header, "header_of", lambda path: names.append(path.name) or parse(path))
    return names


def write(path: Path, name: str, count: int = 1) -> Path:
    save_file({f"{name}{i}": np.zeros(2, np.float32) for i in range(count)}, path)
    return path


def test_a_header_is_parsed_once(tmp_path, parsed):
    file = write(tmp_path / "a.safetensors", "a")
    assert model_header_of(file) is model_header_of(file) and parsed == ["a.safetensors"]
    with pytest.raises(TypeError):
        model_header_of(file)[0]["b"] = 1  # type: ignore[index]


@pytest.mark.parametrize("way", ["replaced", "written in place"])
def test_another_file_of_the_same_size_and_time_of_change(tmp_path, way):
    file = write(tmp_path / "a.safetensors", "a")
    assert list(model_header_of(file)[0]) == ["a0"]
    before = file.stat()
    if way == "replaced":
        write(tmp_path / "b.safetensors", "b").replace(file)
    elif os.name == "nt":
        pytest.skip("Windows has no time of the last change of a file's facts")
    else:
        file.write_bytes(file.read_bytes().replace(b'"a0"', b'"b0"'))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    while way == "written in place" and file.stat().st_ctime_ns == before.st_ctime_ns:  # the clock ticks every 4 ms
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert list(model_header_of(file)[0]) == ["b0"]


def test_a_file_that_may_still_be_written_is_parsed_each_time(tmp_path, monkeypatch, parsed):
    monkeypatch.setattr(model_header, "SETTLED_SECONDS", 60.0)
    file = write(tmp_path / "a.safetensors", "a")
    assert model_header_of(file) == model_header_of(file) and len(parsed) == 2


def test_damaged_and_missing_files_are_not_remembered(tmp_path):
    file = write(tmp_path / "a.safetensors", "a")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="download it again"):
        model_header_of(file)
    file.write_bytes(whole)
    assert model_header_of(file)[0].keys() == {"a0"}
    file.unlink()
    with pytest.raises(FileNotFoundError):
        model_header_of(file)


def test_the_oldest_headers_make_room(tmp_path, monkeypatch, parsed):
    monkeypatch.setattr(model_header, "MAX_TENSORS", 3)
    a, b, c = (write(tmp_path / f"{name}.safetensors", name, count) for name, count in (("a", 1), ("b", 2), ("c", 4)))
    for file in (a, b, a, c, c):  # c has too many on its own
        model_header_of(file)
    assert [name[0] for name in parsed] == ["a", "b", "c", "c"]
    assert not model_header._headers
