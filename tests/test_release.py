"""tools/release.py: versions agree, the registry's fields are complete, the archive holds what the pack needs and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "CHANGELOG.md", "trainer_core/version.py", "docs/images/icon.png", "docs/images/banner.jpg")
pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="pyproject.toml is read by tomllib")
tool = load_script("tools/release.py")


@pytest.fixture
def copy(tmp_path) -> Callable[[str, str, str], Path]:
    """copy(file, old, new): a folder with the files of a release, in one of which a text is replaced."""

    def make(file: str, old: str, new: str) -> Path:
        for name in FILES:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
        text = (tmp_path / file).read_text("utf-8")
        assert len(re.findall(old, text)), old
        (tmp_path / file).write_text(re.sub(old, new, text, count=1), "utf-8")
        return tmp_path

    return make


def test_this_commit_can_be_released():
    assert [*tool.faults_of_versions(ROOT), *tool.faults_of_registry(ROOT)] == []
    in_git = subprocess.run(["git", "-C", str(ROOT), "rev-parse"], capture_output=True, check=False).returncode == 0
    if not in_git:
        pytest.skip("not a git repository")
    assert list(tool.faults_of_files(tool.packed_files(ROOT))) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r'\nversion = "[^"]*"', '\nversion = "0.1"', "the registry wants three numbers"),
        (r'\nversion = "[^"]*"', '\ndynamic = ["version"]', r"\[project\] has no version"),
        (r'\nlicense = "[^"]*"', "", "no license"),
        (r'\nname = "chroma-trainer"', '\nname = "ComfyUI-trainer"', "no name for the registry"),
        (r"\nIssues = .*", "", "no Issues"),
        (r'\nPublisherId = "[^"]*"', '\nPublisherId = ""', "no PublisherId"),
        (r'\nIcon = "[^"]*"', '\nIcon = ""', "Icon is '', which is no image of this repository"),
        (r"images/icon\.png", "images/banner.jpg", r"banner.jpg: 1260 x 540 does not suit the registry's Icon"),
        (r"images/banner\.jpg", "images/icon.png", r"icon.png: 400 x 400 does not suit the registry's Banner"),
        (r'requires-comfyui = "[^"]*"', 'requires-comfyui = "0.8"', "requires-comfyui"),
    ],
)
def test_a_gap_is_named(copy, old, new, message):
    root = copy("pyproject.toml", old, new)
    faults = "\n".join([*tool.faults_of_versions(root), *tool.faults_of_registry(root)])
    assert re.search(message, faults), faults


def test_tag_changelog_and_versions_agree(copy):
    root = copy("CHANGELOG.md", "## Unreleased", "## 0.1.0 (2026-12-01)")
    assert list(tool.faults_of_versions(root, "v0.1.0")) == []
    (fault,) = tool.faults_of_versions(root, "v0.2.0")
    assert "for version 0.1.0 it is 'v0.1.0'" in fault
    assert "is '## Unreleased', not '## 0.1.0 (YYYY-MM-DD)'" in next(tool.faults_of_versions(ROOT, "v0.1.0"))
    root = copy("trainer_core/version.py", r'"0\.1\.0"', '"0.3.0"')
    assert "VERSION is '0.3.0'" in next(tool.faults_of_versions(root))


def test_needless_and_missing_files_are_named():
    names = ["tests/test_a.py", "docs/decisions/0001-a.md", "a/__pycache__/b.pyc", ".github/x.yml", *tool.NEEDED[1:]]
    faults = list(tool.faults_of_files([*names, "trainer_core/train/step/loop.py", "docs/index.md"]))
    assert faults[0] == f"{tool.NEEDED[0]} is not in the archive" and len(faults) == 5


def test_an_archive_is_equal_each_time_and_is_imported_from_its_folder(tmp_path, monkeypatch):
    pack = tmp_path / "source"
    pack.mkdir()
    text = 'WEB_DIRECTORY = "./js"\ncomfy_entrypoint = print\n'
    (pack / "__init__.py").write_text(text, "utf-8")
    (pack / "nodes.py").write_text("ALL_NODES = range(21)\n", "utf-8")
    monkeypatch.setattr(tool, "packed_files", lambda root: ["__init__.py", "nodes.py"])
    monkeypatch.setattr(tool, "NEEDED", ("__init__.py",))
    for name in ("a.zip", "b.zip"):
        tool.write_archive(pack, tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert zipfile.ZipFile(tmp_path / "a.zip").namelist() == ["__init__.py", "nodes.py"]
    assert list(tool.faults_of_archive(tmp_path / "a.zip", tmp_path / "a pack")) == []
    (pack / "nodes.py").write_text("import no_such_module\n", "utf-8")
    tool.write_archive(pack, tmp_path / "c.zip")
    (fault,) = tool.faults_of_archive(tmp_path / "c.zip", tmp_path / "c pack")
    assert "can't be imported from its folder" in fault and "no_such_module" in fault


def test_an_installed_package_says_where_its_demo_is():
    """`make release` trains it, in an environment that takes minutes to make."""
    done = subprocess.run([sys.executable, "-c", tool.PRINT_DEMO], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).name == "first-lora.json" and Path(done.stdout.strip()).is_file()
