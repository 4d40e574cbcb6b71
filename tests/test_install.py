"""install.py: the pack's own needs but torch, under constraints of all that is installed."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

from tests.narrowing import present
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]


def module():
    return load_script("install.py")


def test_it_wants_what_pyproject_says_but_torch():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = re.findall(r'"([^"]+)"', present(re.search(r"\ndependencies = \[(.*?)\n\]", text, re.S))[1])
    assert set(module().WANTED) == {name for name in listed if not re.match(r"torch\b", name)}


def test_what_is_installed_is_kept():
    kept = module().kept()
    assert f"torch=={version('torch')}" in kept and f"numpy=={version('numpy')}" in kept
    assert not any(line.startswith(("pip==", "setuptools==", "-e ")) or "://" in line for line in kept)
    names = [line.split("==")[0] for line in kept]
    assert len(names) == len(set(names))


def test_pip_gets_constraints_and_arguments(monkeypatch):
    install, calls = module(), []

    def run(command, check):
        constraints = Path(command[command.index("-c") + 1]).read_text("utf-8")
        calls.append((command, constraints))

        class Done:
            returncode = 1

        return Done

    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["install.py", "--dry-run"])
    assert install.main() == 1
    ((command, constraints),) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "install"] and "--dry-run" in command
    assert "torch==" in constraints and not any(part == "torch" for part in command)
