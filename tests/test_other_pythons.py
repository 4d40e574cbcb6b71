"""The command line starts in every supported Python that this machine has: syntax, annotations and argparse differ."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MINORS = (10, 13)  # the oldest and the newest; CI runs all tests in each
# Needs no package: the start is light. fields() evaluates the annotations of every node and of the settings behind it.
PROGRAM = """
import pathlib, sys
from importlib import util

root = pathlib.Path(sys.argv.pop(1))
package = util.spec_from_file_location("chroma_trainer", root / "__init__.py", submodule_search_locations=[str(root)])
sys.modules["chroma_trainer"] = util.module_from_spec(package)
from chroma_trainer.cli import main
from chroma_trainer.nodes import CATALOGUE

for spec in CATALOGUE.values():
    spec.fields()
if sys.version_info[1] == 10:
    for folder in ("trainer_core", "nodes"):
        for path in sorted((root / folder).rglob("*.py")):
            compile(path.read_bytes(), str(path), "exec")
main()
"""


def find_python(minor: int) -> str | None:
    """Return the path of a Python 3.minor that is not the one of the tests. A shim of pyenv may be there and not start."""
    installed = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
    candidates = [shutil.which(f"python3.{minor}"), *map(str, installed)]
    for candidate in filter(None, candidates):
        probe = [candidate, "-c", "import sys; print(sys.version_info[1])"]
        if subprocess.run(probe, capture_output=True, text=True).stdout.strip() == str(minor):
            return candidate
    return None


@pytest.mark.parametrize("minor", [minor for minor in MINORS if minor != sys.version_info[1]])
def test_the_command_line_starts(minor):
    python = find_python(minor)
    if not python:
        pytest.skip(f"no Python 3.{minor} on this machine")
    command = [python, "-c", PROGRAM, str(ROOT), "run", "--help"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "80"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: chroma-trainer run")
