"""Talking to a running job through its run folder: what it is doing, and what it shall do. Needs no torch.

status.json    what the job says of itself; written by the job
command.json   pause, stop or resume; written by others, taken by the job between two steps
events.jsonl   everything that happened, a line each (journal.py)
run.lock       held by the process that works here (lock.py)
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import Problem, UserError, nearest
from ..storage.atomic import write_json
from .layout import COMMAND, STATUS, runs_folder
from .lock import is_held

COMMANDS = ("pause", "stop", "resume")
ENDED = ("finished", "stopped", "failed", "died")  # no process works on it


@dataclass(frozen=True)
class Status:
    """What a job says of itself.

    Args:
        state: running, paused, stopped (by the user; it can go on), finished, failed, or died (its process is gone).
        step, total: optimiser steps.
        phase: of the engine, such as "train".
        pid: of the process that wrote this.
        updated: seconds since 1970, when this was written.
        message: why it failed, "" otherwise.
    """

    state: str
    step: int = 0
    total: int = 0
    phase: str = ""
    pid: int = 0
    updated: float = 0.0
    message: str = ""

    def text(self) -> str:
        where = f" at step {self.step} of {self.total}" if self.total else ""
        doing = f" ({self.phase})" if self.state == "running" else ""
        return f"{self.state}{where}{doing}" + (f": {self.message}" if self.message else "")


def read_status(folder: Path) -> Status | None:
    """The job's status; None where none was ever started. A job whose process is gone without a word is "died"."""
    try:
        value = json.loads((Path(folder) / STATUS).read_text("utf-8"))
        known = {field.name for field in dataclasses.fields(Status)}
        status = Status(**{name: item for name, item in value.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    waits = status.state == "paused" and status.pid
    if (status.state == "running" or waits) and not is_held(folder):
        return dataclasses.replace(status, state="died" if status.state == "running" else "paused", pid=0)
    return status


def write_status(folder: Path, status: Status) -> None:
    """Replace status.json. Not synced to the disk: it says nothing that a resume needs."""
    temporary = Path(folder) / f".{STATUS}-{os.getpid()}"
    try:
        temporary.write_text(json.dumps(dataclasses.asdict(status)) + "\n", "utf-8")
        os.replace(temporary, Path(folder) / STATUS)
    except OSError:  # a full disk, or on Windows a reader that has it open: the next one will do
        temporary.unlink(missing_ok=True)


def request(folder: Path, command: str) -> Status:
    """Ask the job in a run folder to pause, stop or resume. It hears between two steps.

    Returns: its status at this moment.
    Raises:
        UserError: no job works there, or it can't do that now.
    """
    assert command in COMMANDS, command
    status = read_status(folder)
    if status is None:
        raise UserError.at(str(folder), "no run was ever started in this folder; name one of `chroma-trainer status`")
    if status.state in ENDED or not status.pid:
        way = f"chroma-trainer run {Path(folder) / 'request.json'}"
        raise UserError.at(
            str(folder), f"is {status.text()}: no process works on it that could {command}; to go on: {way}"
        )
    if command == "resume" and status.state == "running" and take_command(folder) == "pause":
        return status  # it had not heard of the pause yet
    if command == "resume" and status.state != "paused":
        raise UserError.at(str(folder), f"is {status.text()}; only a paused run is resumed")
    write_json(Path(folder) / COMMAND, {"command": command, "time": time.time()})
    return status


def take_command(folder: Path) -> str:
    """The command that waits in the folder, "" where none does. It is removed."""
    path = Path(folder) / COMMAND
    if not os.path.exists(path):  # asked at every step
        return ""
    try:
        command = json.loads(path.read_text("utf-8"))["command"]
    except (OSError, ValueError, TypeError, KeyError):
        command = ""
    path.unlink(missing_ok=True)
    return command if command in COMMANDS else ""


def runs_in(output: Path) -> list[Path]:
    """Run folders under an output folder, the one that was worked on last first."""
    folders = [path.parent for path in runs_folder(output).glob(f"*/{STATUS}")]
    return sorted(folders, key=lambda folder: (-(folder / STATUS).stat().st_mtime, folder.name))


def find_run(text: str, output: Path) -> Path:
    """The run folder a person means: a path, the folder's name, or the LoRA's name (its latest run).

    Raises:
        UserError: there is none, or the name means several runs that are at work.
    """
    if os.path.isfile(Path(text) / STATUS):
        return Path(text)
    known = runs_in(output)
    found = [folder for folder in known if folder.name == text] or [
        folder for folder in known if folder.name.rpartition("-")[0] == text
    ]
    at_work = [folder for folder in found if is_held(folder)]
    if len(at_work) > 1:
        names = ", ".join(folder.name for folder in at_work)
        raise UserError([Problem("run", f"{text!r} means several runs at work: {names}; name one of them")])
    if not found:
        hint = nearest(text, [name for f in known for name in (f.name, f.name.rpartition("-")[0])])
        hint = hint or "; `chroma-trainer status` lists them, --output names another folder of results"
        raise UserError.at("run", f"no run {text!r} in {runs_folder(output)}{hint}")
    return (at_work or found)[0]
