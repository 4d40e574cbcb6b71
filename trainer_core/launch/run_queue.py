"""The runs that wait to be trained in the background, and the one that is trained: a file for each in OUTPUT/chroma_trainer/queue.

A file appears and changes by a rename, and is removed when its run ends. So the queue survives a restart of ComfyUI, and
what a killed process leaves is a queue as well.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.training import TrainingConfig
from ..errors import UserError
from ..runs.layout import QUEUE, runs_folder
from ..storage.atomic import DAMAGED, set_aside, write_json
from ..storage.bounded_files import Unusable, read_json
from .job import STOP

STATES = WAITING, TRAINING, FAILED = "waiting", "training", "failed"
MAX_BYTES = 64 << 20  # of a file, which holds the workflow
ACTIONS = ("up", "remove")
PREFIX = "chroma-trainer-"  # of temporary folders

# Attempts of this process that ended without a finished run, by the LoRA's name: its trainer has to run again.
unfinished: Counter[str] = Counter()


@dataclass(frozen=True)
class Entry:
    """A run in the queue.

    Args:
        id: names the file.
        place: the lowest is trained first.
        name: of the LoRA.
        node: id of its trainer in the workflow.
        job: what is trained (portable_job.py).
        is_detached: whether the run goes on when ComfyUI ends.
        added: time of the request, in seconds since 1970.
        state: waiting; training, from its start on; failed before the run had a folder, which then says so itself.
        message: why it failed.
        run: name of the run's folder, "" before there is one.
        job_folder: name of the temporary folder of the process that trains it, see job.py.
    """

    id: str
    place: int
    name: str
    node: str
    job: dict[str, Any]
    is_detached: bool = False
    added: float = 0.0
    state: str = WAITING
    message: str = ""
    run: str = ""
    job_folder: str = ""

    @property
    def job_path(self) -> Path:
        """The temporary folder; it may be gone, and is one that does not exist where the name is no folder's of a job."""
        is_sound = self.job_folder.startswith(PREFIX) and self.job_folder == os.path.basename(self.job_folder)
        return Path(tempfile.gettempdir()) / (self.job_folder if is_sound else f"{PREFIX}no-job")

    @classmethod
    def from_json(cls, value: Any) -> Entry:
        """Return the entry that a JSON value holds.

        Raises:
            Unusable: it holds none.
        """
        kinds = {item.name: type(item.default) for item in dataclasses.fields(cls)}
        kinds |= {"id": str, "place": int, "name": str, "node": str, "job": dict, "added": float}
        if not isinstance(value, dict) or any(type(value.get(name)) is not kind for name, kind in kinds.items()):
            raise Unusable("is not a run in the queue")
        if value["state"] not in STATES:
            raise Unusable("has an unknown state")
        return cls(**{name: value[name] for name in kinds})


@dataclass
class RunQueue:
    """The queue of an output folder.

    Args:
        output: ComfyUI's output folder.
    """

    output: Path
    _lock: Any = field(default_factory=threading.RLock, repr=False)

    @property
    def folder(self) -> Path:
        return runs_folder(self.output) / QUEUE

    def entries(self) -> list[Entry]:
        """Return the entries in their order. A damaged file is set aside."""
        with self._lock:
            found = [entry for path in self._paths() if (entry := self._read(path))]
        return sorted(found, key=lambda entry: (entry.state != TRAINING, entry.place, entry.added))

    def add(self, name: str, node: str, job: dict[str, Any], is_detached: bool) -> Entry:
        """Add a run to the end, unless the same one waits or is trained. Return its entry.

        One that waits gets the new settings of devices and background, which are no part of the run.
        """
        with self._lock:
            entries = self.entries()
            active = (entry for entry in entries if entry.state != FAILED and entry.name == name)
            if entry := next((entry for entry in active if what_is_trained(entry.job) == what_is_trained(job)), None):
                return self.update(entry, job=job, is_detached=is_detached) if entry.state == WAITING else entry
            place = max((entry.place for entry in entries), default=0) + 1
            entry = Entry(uuid.uuid4().hex[:12], place, name, node, job, is_detached, time.time())
            self._write(entry)
            return entry

    def update(self, entry: Entry, **values: Any) -> Entry:
        """Change an entry, unless it was removed meanwhile. Return it as it is now."""
        with self._lock:
            is_there = os.path.exists(self._path(entry.id))
            changed = dataclasses.replace((is_there and self._read(self._path(entry.id))) or entry, **values)
            if is_there:
                self._write(changed)
            return changed

    def drop(self, entry: Entry) -> None:
        """Remove the entry of a run that has ended."""
        with self._lock:
            self._path(entry.id).unlink(missing_ok=True)

    def act(self, entry_id: str, action: str) -> Entry:
        """Move a run up, or remove it. One that is being started ends as soon as it can.

        Raises:
            UserError: there is no such run.
        """
        assert action in ACTIONS, action
        with self._lock:
            entries = self.entries()
            entry = next((entry for entry in entries if entry.id == entry_id), None)
            if entry is None:
                raise UserError.at("queue", "this run has left the queue: it has ended, or was removed")
            if action == "up":
                self._move_up(entry, entries)
            elif entry.state == TRAINING:
                (entry.job_path / STOP).touch()
            else:
                unfinished[entry.name] += 1
                self.drop(entry)
            return entry

    def _move_up(self, entry: Entry, entries: list[Entry]) -> None:
        waiting = [other for other in entries if other.state == WAITING]
        if entry not in waiting[1:]:
            return  # it is the first already, or does not wait any more
        before = waiting[waiting.index(entry) - 1]
        self._write(dataclasses.replace(entry, place=before.place))
        self._write(dataclasses.replace(before, place=entry.place))

    def _paths(self) -> list[Path]:
        paths = self.folder.glob("*.json") if self.folder.is_dir() else ()
        return sorted(path for path in paths if not path.name.startswith(DAMAGED))

    def _path(self, entry_id: str) -> Path:
        return self.folder / f"{entry_id}.json"

    def _read(self, path: Path) -> Entry | None:
        try:
            entry = Entry.from_json(read_json(path, MAX_BYTES))
            if entry.id != path.stem:
                raise Unusable("has another name")
            return entry
        except Unusable:
            with suppress(OSError):  # a folder that can't be written: the list of runs must not depend on it
                set_aside(path)
        except OSError:  # it was removed at this moment
            pass
        return None

    def _write(self, entry: Entry) -> None:
        write_json(self._path(entry.id), dataclasses.asdict(entry))


def what_is_trained(job: Mapping[str, Any]) -> Any:
    """Return a job without the settings that decide who computes and when."""
    request = job.get("request", {})
    training = {k: v for k, v in request.get("training", {}).items() if k not in TrainingConfig.UNRECORDED}
    return {**job, "request": {**request, "training": training}}


def new_job_folder() -> Path:
    """Return a new temporary folder for the process of a run."""
    return Path(tempfile.mkdtemp(prefix=PREFIX))


def remove_job_folder(folder: Path) -> None:
    """Remove the temporary folder of a process that has ended."""
    shutil.rmtree(folder, ignore_errors=True)


def describe_queue(queue: RunQueue) -> list[dict[str, Any]]:
    """Return the queue as the editor shows it: without what is trained. place: 1 for the first that waits, else 0."""
    entries = queue.entries()
    waiting = [entry.id for entry in entries if entry.state == WAITING]
    names = [item.name for item in dataclasses.fields(Entry) if item.name not in ("job", "job_folder", "place")]
    return [
        {name: getattr(entry, name) for name in names}
        | {"place": waiting.index(entry.id) + 1 if entry.id in waiting else 0}
        for entry in entries
    ]
