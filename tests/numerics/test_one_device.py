"""What a GPU would run, without one: every tensor of a step is on the device, and the host does not wait for it. See pretended.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MUST_FAIL = {"two devices": "at least two devices", "a wait": "waits for the device"}


@pytest.fixture(scope="module")
def faults(tiny_chroma: Path, tiny_flux: Path) -> dict[str, str]:
    """Case -> what went wrong, "" nothing."""
    command = [sys.executable, str(Path(__file__).with_name("pretended.py")), str(tiny_chroma), str(tiny_flux)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return {line["case"]: line["fault"] for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
def test_no_two_devices_meet_and_nothing_waits(faults: dict[str, str]):
    assert {case: fault for case, fault in faults.items() if fault and case not in MUST_FAIL} == {}
    assert len(faults) > 20


def test_a_mixture_and_a_wait_would_be_seen(faults: dict[str, str]):
    assert all(text in faults[case] for case, text in MUST_FAIL.items())
