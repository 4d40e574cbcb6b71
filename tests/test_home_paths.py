"""A ~ at the start of a path is the home folder, in fields and in options of the command."""

from __future__ import annotations

from pathlib import Path

import pytest
from chroma_trainer.cli import main
from chroma_trainer.trainer_core.host import Paths, expand_home
from chroma_trainer.trainer_core.paths import local_paths


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


def test_a_dataset_in_the_home_folder(home):
    (home / "cats").mkdir()
    paths = Paths(home / "out", home / "cache", datasets=(home,))
    assert paths.find_dataset("~/cats", "folder") == (home / "cats").resolve()


def test_only_a_leading_tilde_is_expanded(home):
    assert expand_home("~") == str(home) and expand_home("~cats") == "~cats" and expand_home("a/~/b") == "a/~/b"


def test_an_option_of_the_command(home, capsys):
    assert main(["status", "--output=~/out"]) == 0
    assert f"no runs in {home / 'out' / 'chroma_trainer'}" in capsys.readouterr().out


def test_datasets_are_searched_in_the_order_of_comfyui(tmp_path):
    """Input first, then ComfyUI's own folder of datasets, then that among the models: as docs/datasets.md says."""
    for folder in ("models/datasets/cats", "datasets/cats", "input/dogs", "datasets/dogs"):
        (tmp_path / folder).mkdir(parents=True)
    paths = local_paths([tmp_path / "models"], tmp_path / "output")
    assert paths.find_dataset("cats", "folder") == tmp_path / "datasets" / "cats"
    assert paths.find_dataset("dogs", "folder") == tmp_path / "input" / "dogs"
