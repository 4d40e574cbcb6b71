"""Runs whose processes torchrun starts: the same bytes, and an end that everybody sees, however it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import Event, Notice, RunReported, StepReport
from chroma_trainer.trainer_core.runs.control import read_status
from chroma_trainer.trainer_core.runs.control import request as send_command
from chroma_trainer.trainer_core.train.run import run

from tests.distributed.fleet import free_port
from tests.distributed.jobs import bytes_of
from tests.workshop import DEVICE, Recorder

pytestmark = [
    pytest.mark.slow,  # each process imports torch
    pytest.mark.skipif(sys.platform == "win32", reason="processes are ended by signals here"),
    pytest.mark.skipif(DEVICE != "cpu", reason="the processes would not have the second device"),
]
ROOT = Path(__file__).resolve().parents[2]
VALUES = {"accumulation": 2, "batch_size": 1, "steps": 6, "checkpoint_every": 2, "keep_checkpoints": 9}
WORKFLOW = ROOT / "workflows" / "first-lora.json"
CLI = [sys.executable, str(ROOT / "cli.py")]
NODE = {
    "steps": 20,
    "accumulation": 2,
    "batch_size": 1,
    "warmup_steps": 0,
    "validate_every": 0,
    "eval_images": 0,
    "checkpoint_every": 4,
}
SAMPLERS = ["4.steps=1", "6.steps=1"]  # else a run samples images for longer than it trains
SETTINGS = [f"--set={value}" for value in (*(f"LoRATrainer.{name}={value}" for name, value in NODE.items()), *SAMPLERS)]


def saved(host: Recorder) -> dict[str, str]:
    return bytes_of(host.run_folder, host.lora)


@pytest.fixture(scope="module")
def whole(workshop: Any) -> dict[str, str]:
    host = workshop.host()
    run(workshop.request(**VALUES), host)
    return saved(host)


@pytest.fixture(autouse=True)
def as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))


def test_the_bytes_and_events_of_one_process(workshop: Any, whole: dict[str, str]):
    host = workshop.host()
    result = run(workshop.request(**VALUES, devices="cpu:2"), host)
    assert saved(host) == whole and Path(result.lora.path) == host.lora
    assert [event.step for event in host.all(StepReport)] == [*range(1, 7)] and len(result.losses) == 6
    (report,) = host.all(RunReported)
    assert report.report == result.report and result.report["sha256"] == result.lora.sha256
    assert "training with 2 processes: cpu, cpu" in host.told()
    assert [path.name for path in (host.run_folder / "ranks").iterdir()] == ["rank-1.log"]


def test_a_process_of_its_own(workshop: Any, whole: dict[str, str]):
    host = workshop.host()
    result = run(workshop.request(**VALUES, devices="1"), host)
    assert saved(host) == whole and Path(result.lora.path) == host.lora
    assert [event.step for event in host.all(StepReport)] == [*range(1, 7)] and len(result.losses) == 6
    assert "training in a process of its own: cpu" in host.told()
    assert not (host.run_folder / "ranks").exists()


def processes_of_runs() -> list[psutil.Process]:
    """The processes that runs of this one started. It may have other children: ComfyUI, for other tests."""
    return [child for child in psutil.Process().children(recursive=True) if "worker" in child.cmdline()]


def test_a_process_of_its_own_that_is_killed(workshop: Any, whole: dict[str, str]):
    def kill(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == 3:
            (child,) = processes_of_runs()
            child.kill()

    host = workshop.host(sink=kill)
    with pytest.raises(UserError) as caught:
        run(workshop.request(**{**VALUES, "steps": 100}, devices="1"), host)
    text = str(caught.value)
    assert "it was ended by SIGKILL" in text and "Run again to resume" in text, text
    assert (host.run_folder / "ranks" / "rank-0.log").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="another process's limits can be set on Linux")
def test_a_process_of_its_own_that_runs_out_of_memory(workshop: Any):
    """From step 3 on it gets no more memory than it has."""

    def limit(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == 3:
            (child,) = processes_of_runs()
            child.rlimit(psutil.RLIMIT_AS, (1 << 20, 1 << 20))

    host = workshop.host(sink=limit)
    with pytest.raises(UserError) as caught:
        run(workshop.request(**{**VALUES, "steps": 20_000}, devices="1"), host)
    text = str(caught.value)
    assert "out of memory in the phase" in text, text
    assert processes_of_runs() == []


def test_a_problem_that_a_process_finds_is_raised_here(workshop: Any):
    with pytest.raises(UserError, match="4 devices for 2 micro-batches a step"):
        run(workshop.request(**VALUES, devices="cpu:4"), workshop.host())


def children_of(process: psutil.Process) -> list[psutil.Process]:
    """The processes that train, in the order of their ranks."""
    workers = [child for child in process.children(recursive=True) if "RANK" in child.environ()]
    return sorted(workers, key=lambda child: int(child.environ()["RANK"]))


def test_a_worker_that_is_killed(workshop: Any, whole: dict[str, str]):
    def kill(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == 1:
            os.kill(children_of(psutil.Process())[1].pid, signal.SIGKILL)

    host = workshop.host(sink=kill)
    request = workshop.request(**{**VALUES, "steps": 100}, devices="cpu:2")
    with pytest.raises(UserError) as caught:
        run(request, host)
    text = str(caught.value)
    assert "process 1 of this machine was ended by SIGKILL" in text and "run again to resume" in text, text
    status = read_status(host.run_folder)
    assert status and status.state == "failed"
    assert host.checkpoints and children_of(psutil.Process()) == []


def test_cancelling_ends_after_a_step(workshop: Any, whole: dict[str, str]):
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(workshop.request(**{**VALUES, "steps": 400}, devices="cpu:2"), host)
    assert any("stopped at step" in text for text in host.told()), host.told()
    assert host.checkpoints and host.lora.is_file()


def test_pause_and_resume(workshop: Any):
    """The processes end; the one that started them waits for the command, and starts them again."""
    sent: list[str] = []

    def act(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == 2 and not sent:
            sent.append(send_command(host.run_folder, "pause").state)
        if isinstance(event, Notice) and event.text.startswith("paused"):
            assert children_of(psutil.Process()) == []
            threading.Timer(0.5, lambda: sent.append(send_command(host.run_folder, "resume").state)).start()

    request = workshop.request(**{**VALUES, "steps": 40, "checkpoint_every": 0}, devices="cpu:2")
    host, untouched = workshop.host(sink=act), workshop.host()
    run(request, host)
    run(replace(request, training=replace(request.training, devices="")), untouched)
    assert sent == ["running", "paused"]
    assert host.lora.read_bytes() == untouched.lora.read_bytes()


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}


def trained(output: Path) -> bytes:
    return (output / "loras" / "neonglow.safetensors").read_bytes()


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("one")
    done = subprocess.run([*CLI, "run", str(WORKFLOW), *SETTINGS, "--output", str(output)], env=environment())
    assert done.returncode == 0
    return trained(output)


def test_started_by_torchrun_itself(tmp_path: Path, by_one: bytes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", CLI[1]]
    command += ["run", str(WORKFLOW), *SETTINGS, "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert trained(tmp_path) == by_one
    assert done.stderr.count("- training: 20 steps") == 1, "rank 0 alone prints"


def test_two_machines(tmp_path: Path, by_one: bytes):
    meeting = f"127.0.0.1:{free_port()}"
    machines = []
    for number in (0, 1):
        output = tmp_path / f"machine-{number}"
        options = ["--nodes", "2", "--node", str(number), "--meet", meeting]
        command = [*CLI, "run", str(WORKFLOW), *SETTINGS, "--output", str(output), *options]
        machines.append(subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True))
    texts = [machine.communicate(timeout=300)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], texts
    assert trained(tmp_path / "machine-0") == by_one
    assert not (tmp_path / "machine-1" / "loras").exists()


def test_ctrl_c_and_the_end_of_the_parent(tmp_path: Path, by_one: bytes):
    """Ctrl-C reaches the command line alone, which ends all after a step; if it is killed, they end by themselves."""
    command = [*CLI, "run", str(WORKFLOW), *SETTINGS, "--output", str(tmp_path), "--devices", "cpu:2"]
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
        assert process.stderr
        for line in process.stderr:
            if "- training" in line:
                break
        workers = children_of(psutil.Process(process.pid))
        assert len(workers) == 2
        process.send_signal(number)
        process.communicate(timeout=120)
        assert process.returncode == status
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert alive == []
        (folder,) = (path for path in (tmp_path / "chroma_trainer").iterdir() if path.name.startswith("neonglow"))
        current = read_status(folder)
        assert current and current.state == "stopped"
    assert subprocess.run(command, env=environment()).returncode == 0
    assert trained(tmp_path) == by_one
