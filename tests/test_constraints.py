"""constraints.txt pins each package once for every supported Python. tools/check_constraints.py checks that pip resolves them."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LINES = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
PINS = [Requirement(line) for line in LINES if line and not line.startswith("#")]


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_each_package_has_one_version(version):
    names = [pin.name for pin in PINS if not pin.marker or pin.marker.evaluate({"python_version": version})]
    assert sorted(names) == sorted({pin.name for pin in PINS})


def test_each_pin_is_exact():
    for pin in PINS:
        assert [clause.operator for clause in pin.specifier] == ["=="], pin
