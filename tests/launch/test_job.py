"""What processes get and leave: every request, result and event comes back as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.trainer_core.config.flux import FluxOptions
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.errors import Problem
from chroma_trainer.trainer_core.host import (
    CheckpointSaved,
    EvalCompared,
    EvalReport,
    Event,
    ImagesScored,
    LeakMeasured,
    LoraSaved,
    Machines,
    MemoryInUse,
    MemoryPlanned,
    Notice,
    Paths,
    PhaseProgress,
    PhaseStarted,
    PreviewReady,
    RunOpened,
    RunReported,
    SamplingPreview,
    StepReport,
    SweepReported,
)
from chroma_trainer.trainer_core.launch.job import FINISHED, Job, Result, decode_event, encode_event
from chroma_trainer.trainer_core.launch.torchrun import options_of

EVENTS = [
    Notice("größer 猫", "warning", "groesser"), PhaseStarted("train", 3, "steps"), PhaseProgress("eval", 1, 2),
    StepReport(1, 3, 0.1, 1e-4, float("inf"), 0.5), EvalReport(0, 0.3, 0.0, True), PreviewReady(2, Path("a.png")),
    CheckpointSaved(2, Path("out/step")), LoraSaved(Path("l.safetensors"), "ab", 3, 4), RunOpened(Path("out/run")),
    EvalCompared(4, 2, 0.01, 0.002, 0.2, (0.3, 0.7), 2, (0.1, -0.1), (0.01, 0.02), 1, False),
    LeakMeasured(4, 0.3, 0.1, (0.125, 0.375), (0.2, None), 0.5, 0.15),
    ImagesScored(4, 1.0, True, 25.5, 0.4, 0.2, 0.1, None, None, None, None, ("猫",), (25.5,)),
    SweepReported("s", ("rank",), 2, ({"values": {"rank": "4"}, "loss": None, "leak": {"mean": 0.1}},)),
    SamplingPreview(3, 26, Path("p.jpg")), MemoryPlanned(0, 5), MemoryInUse("RAM", 5, 0, 7), RunReported({"loss": [0.5, None], "files": {"run": "x"}}),
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_event_comes_back(event: Event):
    line = encode_event(event)
    assert "\n" not in line and decode_event(line) == event


def test_every_kind_of_event_is_here():
    assert {type(event) for event in EVENTS} == set(Event.__args__)  # type: ignore[attr-defined]


def test_a_request_comes_back(workshop: Any, tmp_path: Path):
    validation = ValidationConfig(prompts="a\nb", reference="/tmp/image.png")
    request = workshop.request(validation, devices="cpu:2")
    request = replace(request, model=replace(request.model, flux=FluxOptions(max_tokens=24)))
    paths = Paths(Path("out"), Path("cache"), {"vae": (Path("a"), Path("b"))}, (Path("d"),))
    job = Job(request, paths, {"5": {"class_type": "LoRATrainer", "inputs": {"rank": 4}}})
    job.write(tmp_path)
    assert Job.read(tmp_path) == job


def test_a_result_comes_back(tmp_path: Path):
    assert Result.read(tmp_path) is None
    result = Result(FINISHED, ("a", "b", "c", "d"), (0.5, 0.25), {"best": None}, (Problem("rank", "is 0", "5", "X"),))
    result.write(tmp_path)
    assert Result.read(tmp_path) == result


def test_the_options_of_torchrun():
    assert options_of(2, Machines())[:3] == ["--standalone", "--nproc-per-node", "2"]
    several = options_of(8, Machines(4, 1, "10.0.0.1:29500"))
    assert several[:8] == ["--nnodes", "4", "--node-rank", "1", "--master-addr", "10.0.0.1", "--master-port", "29500"]
