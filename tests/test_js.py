"""The tests of js/, in tests/js, by Node's own test runner. Without Node they are skipped, with a warning."""

from __future__ import annotations

import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import NoReturn

import pytest

TESTS = Path(__file__).with_name("js")
OLDEST = (18, 19)  # the first with module hooks


def test_the_modules_of_the_page():
    done = subprocess.run(
        [find_node(), "--test", "--test-reporter", "spec", *map(str, sorted(TESTS.glob("*.test.mjs")))],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-10000:]}\n{done.stderr[-2000:]}"
    counts = dict(re.findall(r"^\S+ (tests|pass|fail) (\d+)$", done.stdout, re.MULTILINE))
    assert counts["tests"] == counts["pass"] != "0", done.stdout[-2000:]  # a run without a test is a failure


def find_node() -> str:
    node = shutil.which("node")
    if not node:
        skip_loudly("no Node on the PATH")
    version = subprocess.run([node, "--version"], capture_output=True, text=True).stdout.strip()
    found = re.match(r"v(\d+)\.(\d+)", version)
    if not found or tuple(map(int, found.groups())) < OLDEST:
        skip_loudly(f"Node {version} is older than {'.'.join(map(str, OLDEST))}")
    return node


def skip_loudly(reason: str) -> NoReturn:
    warnings.warn(f"NOT TESTED: js/, {reason}", stacklevel=2)
    pytest.skip(reason)
