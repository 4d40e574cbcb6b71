"""What a GPU would run, without one: every tensor of a step is on the device, and the host does not wait for it. See pretended.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MUST_FAIL = {"two devices": "at least two devices", "a wait": "waits for the device"}


QUICK = ("chroma, int8-quanto", "optimizer adamw")


def faults_of(tiny_chroma: Path, tiny_flux: Path, *cases: str) -> dict[str, str]:
    """Case -> what went wrong, "" nothing."""
    script = str(Path(__file__).with_name("pretended.py"))
    command = [sys.executable, script, str(tiny_chroma), str(tiny_flux), *cases]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return {line["case"]: line["fault"] for line in map(json.loads, done.stdout.splitlines())}


def only_what_must(faults: dict[str, str]) -> bool:
    assert {case: fault for case, fault in faults.items() if fault and case not in MUST_FAIL} == {}
    return all(text in faults[case] for case, text in MUST_FAIL.items())


def test_a_mixture_and_a_wait_would_be_seen(tiny_chroma: Path, tiny_flux: Path):
    faults = faults_of(tiny_chroma, tiny_flux, *QUICK, *MUST_FAIL)
    assert only_what_must(faults) and faults.keys() == {*QUICK, *MUST_FAIL}


@pytest.mark.slow
def test_no_two_devices_meet_and_nothing_waits(tiny_chroma: Path, tiny_flux: Path):
    faults = faults_of(tiny_chroma, tiny_flux)
    assert only_what_must(faults) and len(faults) > 20
