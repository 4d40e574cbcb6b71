"""`pytest --processor-time`: which tests it lists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import pytest

def test_quick():
    pass

@pytest.mark.slow
def test_slow():
    pass
"""


def test_it_lists_what_is_not_marked_slow(tmp_path: Path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n", "utf-8")
    (tmp_path / "test_two.py").write_text(TESTS, "utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "tests.processor_time", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, "--processor-time=-1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = [line.split() for line in done.stdout.partition("processor time")[2].splitlines()]
    assert [words[2] for words in printed if len(words) == 3] == ["test_two.py::test_quick", "test_two.py"]
    assert "in 2 tests" in done.stdout
