"""Two processes can't share a run folder, and a running job hears pause, stop and resume through it to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from chroma_trainer.cli import main
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import StepReport
from chroma_trainer.trainer_core.runs import control
from chroma_trainer.trainer_core.runs.control import find_run, read_status, request, runs_in, take_command
from chroma_trainer.trainer_core.runs.event_log import EventLog, read_events
from chroma_trainer.trainer_core.runs.lock import Locked, RunLock, is_held
from chroma_trainer.trainer_core.runs.run_host import Paused, open_run
from chroma_trainer.trainer_core.train.run import run

HOLD = (
    "import sys, time; from chroma_trainer.trainer_core.runs.lock import RunLock; from pathlib import Path\n"
    "with RunLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path, holder):
    with pytest.raises(Locked), RunLock(tmp_path):
        pass
    assert is_held(tmp_path)
    holder.kill()
    holder.wait()
    assert not is_held(tmp_path)
    with RunLock(tmp_path):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)


def test_the_one_who_holds_it_is_named(tmp_path, workshop, holder):
    control.write_status(tmp_path, control.Status("running", 3, 9, "train", holder.pid))
    with pytest.raises(UserError) as caught, open_run(tmp_path, workshop.host()):
        pass
    assert f"process {holder.pid} (running at step 3 of 9 (train)) is using this run folder" in str(caught.value)


def test_a_status_without_its_process_is_a_death(tmp_path):
    control.write_status(tmp_path, control.Status("running", 3, 9, "train", 1))
    found = read_status(tmp_path)
    assert found and found.state == "died" and found.text() == "died at step 3 of 9"
    assert found.clause() == "ended unexpectedly at step 3 of 9"
    assert read_status(tmp_path / "nowhere") is None


@pytest.mark.parametrize("state", ["finished", "stopped", "failed", "running", "paused"])
def test_a_command_for_nobody_says_how_to_go_on(tmp_path, state):
    control.write_status(tmp_path, control.Status(state, 3, 9, "train", 0))
    with pytest.raises(
        UserError, match=r"no process is running that could stop; to resume the run: chroma-trainer run .*request\.json"
    ):
        request(tmp_path, "stop")
    assert take_command(tmp_path) == ""


def test_resume_needs_a_pause(tmp_path, holder):
    control.write_status(tmp_path, control.Status("running", 3, 9, "train", holder.pid))
    with pytest.raises(UserError, match="only a paused run can be resumed"):
        request(tmp_path, "resume")
    request(tmp_path, "pause")
    request(tmp_path, "resume")  # before it was heard: both are void
    assert take_command(tmp_path) == ""


def test_resume_leaves_a_stop_that_was_not_heard_yet(tmp_path, holder):
    control.write_status(tmp_path, control.Status("running", 3, 9, "train", holder.pid))
    request(tmp_path, "stop")
    with pytest.raises(UserError, match="only a paused run can be resumed"):
        request(tmp_path, "resume")
    assert take_command(tmp_path) == "stop"


def test_a_command_sent_while_another_is_read_is_heard_next(tmp_path, holder, monkeypatch):
    control.write_status(tmp_path, control.Status("running", 3, 9, "train", holder.pid))
    request(tmp_path, "pause")
    read = control.read_json

    def read_slowly(path, size):
        value = read(path, size)
        monkeypatch.setattr(control, "read_json", read)
        request(tmp_path, "stop")
        return value

    monkeypatch.setattr(
        control, "read_json", lambda path, size: (read_slowly if "command" in path.name else read)(path, size)
    )
    assert [take_command(tmp_path) for _ in range(3)] == ["pause", "stop", ""]
    assert not list(tmp_path.glob("*command*")) and not list(tmp_path.glob(".*command*"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"command": "rm -rf"}', '{"command": 3}'])
def test_what_is_no_command_is_none(tmp_path, text):
    (tmp_path / control.COMMAND).write_text(text, "utf-8")
    assert take_command(tmp_path) == "" and not (tmp_path / control.COMMAND).exists()


def commanded(host, command: str, at: int):
    """The host, whose run is given a command after step `at`, through its folder."""

    def sink(event):
        if isinstance(event, StepReport) and event.step == at:
            request(host.run_folder, command)

    object.__setattr__(host, "sinks", (*host.sinks, sink))
    return host


def test_stop_leaves_a_checkpoint_and_a_lora_and_the_next_start_goes_on(workshop, plain_run):
    whole = plain_run[1]
    host = commanded(workshop.host(), "stop", at=3)
    with pytest.raises(Cancelled):
        run(workshop.request(), host)
    status = read_status(host.run_folder)
    assert status and (status.state, status.step, status.total) == ("stopped", 3, 6)
    assert "step-000003" in host.checkpoints and host.lora.is_file()
    result = run(workshop.request(), host)
    assert result.report["resumed_from"] == 3 and result.lora.sha256 == whole.lora.sha256
    status = read_status(host.run_folder)
    assert status and (status.state, status.step) == ("finished", 6)


def test_pause_and_resume_equals_an_uninterrupted_run(workshop, plain_run):
    whole = plain_run[1]
    host = commanded(workshop.host(), "pause", at=2)

    def resume():
        while (
            (status := read_status(host.run_folder) if _has_run(host) else None) is None
            or status.state != "paused"
            or not status.pid
        ):
            time.sleep(0.02)
        assert is_held(host.run_folder)
        request(host.run_folder, "resume")

    friend = threading.Thread(target=resume)
    friend.start()
    result = run(workshop.request(), host)
    friend.join()
    assert result.report["resumed_from"] == 2 and result.losses == whole.losses
    assert result.lora.sha256 == whole.lora.sha256
    assert any(text.startswith("paused; memory is free. To resume: chroma-trainer resume") for text in host.told())


def _has_run(host) -> bool:
    folder = host.paths.output / "chroma_trainer"
    return folder.is_dir() and any(folder.glob("*/status.json"))


def test_where_others_queue_behind_it_a_pause_ends_the_run(workshop):
    host = commanded(workshop.host(), "pause", at=2)
    object.__setattr__(host, "waits_when_paused", False)
    with pytest.raises(Paused):
        run(workshop.request(), host)
    status = read_status(host.run_folder)
    assert status and (status.state, status.step, status.pid) == ("paused", 2, 0) and not is_held(host.run_folder)


def test_a_stop_ends_a_pause(workshop):
    host = commanded(workshop.host(), "pause", at=2)

    def told(event):
        if getattr(event, "text", "").startswith("paused;"):
            (host.run_folder / control.COMMAND).write_text('{"command": "stop"}', "utf-8")

    object.__setattr__(host, "sinks", (*host.sinks, told))
    with pytest.raises(Cancelled):
        run(workshop.request(), host)
    status = read_status(host.run_folder)
    assert status and status.state == "stopped" and not is_held(host.run_folder)


def test_a_fault_is_in_the_status(workshop, monkeypatch):
    from chroma_trainer.trainer_core.train import run as run_module

    def broken(*values):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(run_module, "fit", broken)
    host = workshop.host()
    with pytest.raises(RuntimeError):
        run(workshop.request(), host)
    status = read_status(host.run_folder)
    assert status and (status.state, status.message) == ("failed", "two | lines")


def test_the_journal_has_the_whole_history_once(workshop):
    host = workshop.host().cancelling_at(5)
    with pytest.raises(Cancelled):
        run(workshop.request(), host)
    (host.run_folder / "checkpoints" / "step-000005" / "state.json").write_text("{}", "utf-8")
    with (host.run_folder / "events.jsonl").open("ab") as file:
        file.write(b'{"kind": "StepReport", "ste')  # a process was killed while it wrote
    result = run(workshop.request(), host.cancelling_at(0))
    events = list(read_events(host.run_folder))
    assert [e["step"] for e in events if e["kind"] == "StepReport"] == [1, 2, 3, 4, 5, 5, 6]
    steps = list({e["step"]: e for e in read_events(host.run_folder) if e["kind"] == "StepReport"}.values())
    assert [e["step"] for e in steps] == [1, 2, 3, 4, 5, 6] and tuple(e["loss"] for e in steps) == result.losses
    assert {"PhaseStarted", "CheckpointSaved", "LoraSaved", "Notice"} <= {e["kind"] for e in events}
    saved = [e["path"] for e in events if e["kind"] == "CheckpointSaved"]
    assert saved[0] == "checkpoints/step-000002"


def test_a_journal_that_can_not_be_written_is_told_once_and_ends_nothing(workshop, plain_run, monkeypatch):
    whole = plain_run[1]

    def full(self, value):
        if self._file is not None:
            self._file.close()
            self._file, self.fault = None, os.strerror(28)

    monkeypatch.setattr(EventLog, "write", full)
    host = workshop.host()
    assert run(workshop.request(), host).lora.sha256 == whole.lora.sha256
    assert (
        sum("events.jsonl can't be written: No space left on device; the run continues" in text for text in host.told())
        == 1
    )


def test_runs_are_found_by_folder_by_name_and_by_path(workshop, tmp_path):
    host = workshop.host()
    run(workshop.request(steps=1), host)
    folder, output = host.run_folder, host.paths.output
    assert runs_in(output) == [folder]
    assert find_run(folder.name, output) == find_run("tiny", output) == find_run(str(folder), tmp_path) == folder
    with pytest.raises(UserError, match=r"no run 'tinny' in .*; did you mean 'tiny'"):
        find_run("tinny", output)


def test_status_pause_and_stop_on_the_command_line(workshop, tmp_path, capsys):
    assert main(["status", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("no runs in ")
    host = workshop.host()
    run(workshop.request(steps=1), host)
    output = ["--output", str(host.paths.output)]
    assert main(["status", "tiny", *output]) == 0
    assert capsys.readouterr().out == f"{host.run_folder.name}: finished at step 1 of 1\n"
    assert main(["pause", "tiny", *output]) == 2
    assert "is finished at step 1 of 1: no process is running that could pause" in capsys.readouterr().err
    with RunLock(host.run_folder):
        control.write_status(host.run_folder, control.Status("running", 1, 9, "train", os.getpid()))
        assert main(["stop", host.run_folder.name, *output]) == 0
        assert json.loads((host.run_folder / control.COMMAND).read_text("utf-8"))["command"] == "stop"
