"""Read the status of a run and send it commands, through files in its run folder. Needs no torch.

status.json    current state; written by the run
command.json   pause, stop or resume; written by others, read and deleted by the run between two steps
events.jsonl   all events, one a line (event_log.py)
run.lock       locked by the process that uses the folder (lock.py)
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Problem, UserError, nearest, quoted
from ..storage.atomic import TEMPORARY, set_aside, write_json
from ..storage.bounded_files import Unusable, read_json
from .layout import CHECKPOINTS, COMMAND, STATUS, flat_name, list_checkpoints, name_of_run, runs_folder, step_of
from .lock import is_held

COMMANDS = ("pause", "stop", "resume")
ENDED = ("finished", "stopped", "failed", "died")  # states without a process
CLAUSES = {  # states as a clause after the name of a run
    "running": "is running",
    "paused": "is paused",
    "stopped": "was stopped",
    "finished": "is finished",
    "failed": "failed",
    "died": "ended unexpectedly",
}
STATES = ("running", "paused", *ENDED)
UNREADABLE = f"unreadable ({STATUS} is damaged)"
MAX_BYTES = 1 << 20  # of status.json and command.json


@dataclass(frozen=True)
class Status:
    """Current state of a run, as it is stored in status.json.

    Args:
        state: running, paused, stopped (by the user; can be resumed), finished, failed, or died (its process is gone).
        step: completed optimizer steps.
        total: optimizer steps of the whole run.
        phase: phase of the run, such as "train".
        pid: id of the process that wrote the status, 0 where none is active.
        updated: time of writing, in seconds since 1970.
        message: why the run failed, "" otherwise.
        learned: what the newest evaluation on held-out images says, "" before there is one.
        scored: the scores of the newest validation images, "" before there are any.
    """

    state: str
    step: int = 0
    total: int = 0
    phase: str = ""
    pid: int = 0
    updated: float = 0.0
    message: str = ""
    learned: str = ""
    scored: str = ""

    @classmethod
    def from_json(cls, value: Any) -> Status:
        """Return the status that a JSON value holds. Unknown entries are ignored.

        Raises:
            Unusable: it is none, or has values of other types.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: item for name, item in value.items() if name in names} if isinstance(value, dict) else {}
        numbers = [known.get(name, 0) for name in ("step", "total", "pid")]
        texts = [known.get(name, "") for name in ("phase", "message", "learned", "scored")]
        updated = known.get("updated", 0.0)
        if (
            known.get("state") not in STATES
            or not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
            or not all(isinstance(text, str) for text in texts)
            or isinstance(updated, bool) or not isinstance(updated, int | float) or not math.isfinite(updated)
        ):  # fmt: skip
            raise Unusable("is not the status of a run")
        return cls(**known)

    def text(self) -> str:
        """Return the status in words, such as "running at step 3 of 6 (train)"."""
        return "; ".join(filter(None, (f"{self.state}{self._details()}", self.learned, self.scored)))

    def clause(self) -> str:
        """Return the status as a clause after the name of the run, such as "ended unexpectedly at step 3 of 6"."""
        return f"{CLAUSES.get(self.state, f'is {self.state}')}{self._details()}"

    def _details(self) -> str:
        where = f" at step {self.step} of {self.total}" if self.total else ""
        doing = f" ({self.phase})" if self.state == "running" else ""
        return f"{where}{doing}" + (f": {self.message}" if self.message else "")


def read_status(folder: Path) -> Status | None:
    """Return the status of a run; None where none was started in the folder, or status.json is damaged.

    A run whose process ended without updating its status is "died".
    """
    try:
        status = Status.from_json(read_json(Path(folder) / STATUS, MAX_BYTES))
    except (OSError, Unusable):
        return None
    waits = status.state == "paused" and status.pid
    if (status.state == "running" or waits) and not is_held(folder):
        return dataclasses.replace(status, state="died" if status.state == "running" else "paused", pid=0)
    return status


def recover_status(folder: Path) -> Status | None:
    """Return the status of a run, and replace a damaged one by what is known: that the run ended, and its last checkpoint.

    The damaged file is set aside. None where no run was started in the folder.
    """
    status = read_status(folder)
    if status or not os.path.lexists(Path(folder) / STATUS):
        return status
    if is_held(folder):  # the run writes it again in a second
        return Status("running", updated=time.time())
    renamed = set_aside(Path(folder) / STATUS)
    steps = [step_of(path) for path in list_checkpoints(Path(folder) / CHECKPOINTS)]
    message = f"{STATUS} was damaged and is now {renamed.name}"
    updated = renamed.stat().st_mtime
    status = Status("died", max(steps, default=0), phase="train", updated=updated, message=message)
    write_status(folder, status)
    return status


def write_status(folder: Path, status: Status) -> None:
    """Replace status.json. It is not synced to the disk, because a resume does not need it."""
    temporary = Path(folder) / f".{STATUS}-{os.getpid()}"
    try:
        temporary.write_text(json.dumps(dataclasses.asdict(status)) + "\n", "utf-8")
        os.replace(temporary, Path(folder) / STATUS)
    except OSError:  # a full disk, or on Windows a reader that has the file open: the next write may succeed
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def request(folder: Path, command: str) -> Status:
    """Send a command to the run in a folder: pause, stop or resume. The run obeys between two steps.

    Returns:
        The status of the run at this moment.
    Raises:
        UserError: no process runs there, or its state does not allow the command.
    """
    assert command in COMMANDS, command
    status = read_status(folder)
    if status is None:
        fault = (
            f"{STATUS} is damaged" if os.path.lexists(Path(folder) / STATUS) else "no run was started in this folder"
        )
        raise UserError.at(str(folder), f"{fault}; use one that `chroma-trainer status` lists")
    if status.state in ENDED or not status.pid:
        way = f"chroma-trainer run {Path(folder) / 'request.json'}"
        raise UserError.at(
            str(folder), f"{status.clause()}: no process is running that could {command}; to resume the run: {way}"
        )
    if command == "resume" and status.state == "running" and (unread := take_command(folder)):
        if unread == "pause":
            return status
        _write_command(folder, unread)
    if command == "resume" and status.state != "paused":
        raise UserError.at(str(folder), f"{status.clause()}; only a paused run can be resumed")
    _write_command(folder, command)
    return status


def _write_command(folder: Path, command: str) -> None:
    write_json(Path(folder) / COMMAND, {"command": command, "time": time.time()})


def take_command(folder: Path) -> str:
    """Return the command in the folder and delete it; "" where there is none."""
    path = Path(folder) / COMMAND
    if not os.path.exists(path):  # cheap, because it is checked at every step
        return ""
    taken = path.with_name(f"{TEMPORARY}{os.getpid()}-{threading.get_ident()}-{COMMAND}")
    try:
        os.replace(path, taken)  # a command that is sent while this one is read stays
        command = read_json(taken, MAX_BYTES)["command"]
    except (OSError, ValueError, TypeError, KeyError):
        command = ""
    with suppress(OSError):
        taken.unlink(missing_ok=True)
    return command if command in COMMANDS else ""


def runs_in(output: Path) -> list[Path]:
    """Return the run folders of an output folder, the most recently updated first. Their status may be damaged."""
    root = runs_folder(output)
    dated: list[tuple[float, str]] = []
    with suppress(OSError):  # no folder, or no permission to read it
        for name in os.listdir(root):
            with suppress(OSError, ValueError):  # no run, or removed at this moment
                dated.append((-os.lstat(root / name / STATUS).st_mtime, name))
    return [root / name for _, name in sorted(dated)]


def find_run(text: str, output: Path) -> Path:
    """Return the run folder for a user's input.

    Args:
        text: path or name of the folder, or name of the LoRA, which stands for its latest run.
        output: the output folder to search.
    Raises:
        UserError: there is none, or the name stands for several active runs.
    """
    return Path(text) if os.path.isfile(Path(text) / STATUS) else find_run_by_name(text, output)


def find_run_by_name(text: str, output: Path) -> Path:
    """Return the run folder in the output folder for a user's input, as find_run does for what is no path."""
    folders = runs_in(output)
    matches = [folder for folder in folders if folder.name == text] or [
        folder for folder in folders if name_of_run(folder) == flat_name(text)
    ]
    active = [folder for folder in matches if is_held(folder)]
    if len(active) > 1:
        names = ", ".join(folder.name for folder in active)
        raise UserError(
            [Problem("run", f"{quoted(text)} matches several active runs: {names}; use one of these names")]
        )
    if not matches:
        hint = nearest(text, [name for f in folders for name in (f.name, name_of_run(f))])
        hint = hint or "; `chroma-trainer status` lists all runs, --output selects another output folder"
        raise UserError.at("run", f"no run {quoted(text)} in {runs_folder(output)}{hint}")
    return (active or matches)[0]
