"""The options of the command line for several devices and machines: what is refused, and what the plan says."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.cli import main
from chroma_trainer.trainer_core.command_line.interrupts import Interrupts

WORKFLOW = str(Path(__file__).resolve().parents[2] / "workflows" / "first-lora.json")
FOUR = ["--set", "LoRATrainer.accumulation=4"]


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["check", WORKFLOW, "--devices", "cpu:2"], "2 devices for 1 micro-batches a step"),
        (["check", WORKFLOW, "--devices", "both"], "'both' is not a list of devices"),
        (["run", WORKFLOW, *FOUR, "--devices", "cpu:2", "--device", "cpu"], "give one of the two options"),
        (["run", WORKFLOW, "--nodes", "2", "--node", "2", "--meet", "a:1"], "--node: is 2; give the number of"),
        (["run", WORKFLOW, "--nodes", "1", "--node", "0", "--meet", "a:1"], "--nodes: is 1; give the number"),
        (["run", WORKFLOW, "--nodes", "2", "--node", "0"], "--meet: is None; give the name or address of machine 0"),
        (["run", WORKFLOW, "--nodes", "2", "--node", "0", "--meet", "a:b"], "--meet: is 'a:b'"),
        (["run", WORKFLOW, "--nodes", "2", "--node", "0", "--meet", "a:1"], "2 devices for 1 micro-batches a step"),
    ],
)  # fmt: skip
def test_what_is_refused(command: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().rglob("*.safetensors"))


def test_devices_that_have_work_are_no_problem(capsys: pytest.CaptureFixture[str]):
    assert main(["check", WORKFLOW, *FOUR, "--devices", "cpu:4"]) == 0


@pytest.mark.slow
def test_the_plan_counts_the_ram_of_all_processes(capsys: pytest.CaptureFixture[str]):
    plans = {}
    for devices in ("", "cpu:2", "cpu:3"):
        capsys.readouterr()
        assert main(["plan", WORKFLOW, *FOUR, "--devices", devices, "--json", "--ram", "64"]) == 0
        plans[devices] = json.loads(capsys.readouterr().out)
    one, two, three = plans.values()
    for name, phase in one["phases"].items():
        assert two["phases"][name]["ram_bytes"] == 2 * phase["ram_bytes"]
    assert three["ram_peak_bytes"] == 3 * one["ram_peak_bytes"] and "3 processes" in three["settings"]
    assert one["machine"]["ram_bytes"] == two["machine"]["ram_bytes"] and two["fits"]
    assert main(["plan", WORKFLOW, *FOUR, "--devices", "cpu:4", "--json", "--ram", "1"]) == 0
    assert not json.loads(capsys.readouterr().out)["fits"], "one process would fit"


def test_a_process_that_was_asked_to_stop_survives_one_signal(monkeypatch: pytest.MonkeyPatch):
    """torchrun signals all processes of a run when one of them fails; the first may be saving then."""
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    interrupts = Interrupts()
    assert not interrupts()
    interrupts.stop()
    assert interrupts()
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        handlers[signal.SIGTERM](signal.SIGTERM, None)
