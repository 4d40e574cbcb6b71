"""The event log of a run: every event is a line of events.jsonl, and status.json has the current state."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..host import (
    EvalCompared,
    EvalReport,
    Event,
    ImagesScored,
    PhaseStarted,
    RunReported,
    SamplingPreview,
    StepReport,
    event_kind,
)
from ..storage.stored_names import stored_values
from .control import Status, write_status
from .layout import EVENTS

RESUMED = "Resumed"  # kind of a line that only the log has: it is no Event
STATUS_SECONDS = 1.0  # status.json is at most this old during training
WAIT_SECONDS = 0.3  # interval at which a paused run looks for a command


class EventLog:
    """A sink that writes to a run folder.

    A full disk does not end the run. The first error is stored in `fault`, and nothing more is written.
    """

    def __init__(self, folder: Path):
        self.folder, self.fault, self.ended_by_user = folder, "", False
        self.status = Status("running", pid=os.getpid())
        self._due = 0.0
        try:
            self._file = (folder / EVENTS).open("ab+", buffering=0)
            end = self._file.seek(0, os.SEEK_END)
            if end:
                self._file.seek(end - 1)
                if self._file.read(1) != b"\n":  # a killed process left an incomplete line
                    self._file.write(b"\n")
        except OSError as error:
            self._file, self.fault = None, error.strerror or str(error)

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunReported | SamplingPreview):  # stored in report.json; of the moment only
            return
        self.write(event_json(event, self.folder))
        if isinstance(event, PhaseStarted):
            total = event.total if event.phase == "train" else self.status.total
            self.set(phase=event.phase, total=total)
        elif isinstance(event, StepReport):
            self.status = dataclasses.replace(self.status, step=event.step, total=event.total)
            if time.monotonic() >= self._due:
                self.set()
        elif isinstance(event, EvalReport) and event.held_out:
            self.set(learned=f"held-out loss {event.loss:.4f} at step {event.step}")
        elif isinstance(event, EvalCompared) and self.status.learned:
            self.set(learned=f"{self.status.learned}{learned_text(event)}")
        elif isinstance(event, ImagesScored) and event.is_shown:
            self.set(scored=scored_text(event))

    def write(self, value: Mapping[str, Any]) -> None:
        """Append a line with a time stamp to events.jsonl."""
        if self._file is None:
            return
        try:
            text = json.dumps({"time": round(time.time(), 3), **value}, ensure_ascii=False)
            self._file.write(text.encode("utf-8", "backslashreplace") + b"\n")  # lone surrogates, as JSON escapes them
        except OSError as error:
            self._file.close()
            self._file, self.fault = None, error.strerror or str(error)

    def set(self, **values: Any) -> None:
        """Update fields of the status, and write it."""
        self.status = dataclasses.replace(self.status, **values, updated=round(time.time(), 3))
        self._due = time.monotonic() + STATUS_SECONDS
        write_status(self.folder, self.status)

    def close(self) -> None:
        if self._file:
            self._file.close()


def learned_text(event: EvalCompared) -> str:
    """Return what an evaluation says beside the earlier ones, as the end of a line about the held-out loss."""
    text = ""
    if event.waiting:
        text = f", {event.change:+.4f} +- {event.change_error:.4f} since its lowest at step {event.best}"
    return text + ("; the run overfits" if event.overfits else "")


def scored_text(event: ImagesScored) -> str:
    """Return the scores of validation images in words."""
    likeness = ""
    if event.likeness is not None and event.likeness_error is not None:
        error = f" +- {event.likeness_error:.4f}" if event.likeness_error else ""
        likeness = f", likeness {event.likeness:.4f}{error}"
    error = f" +- {event.clip_error:.2f}" if event.clip_error else ""  # of one image there is none
    return f"CLIP score {event.clip:.2f}{error}{likeness} at step {event.step}"


def event_json(event: Event, folder: Path) -> dict[str, Any]:
    """Return an event as JSON values: its kind and its fields. Paths in the run folder are relative to it."""
    values: dict[str, Any] = {"kind": event_kind(event)}
    for name, value in stored_values(event).items():
        if isinstance(value, Path):
            value = value.relative_to(folder).as_posix() if value.is_relative_to(folder) else str(value)
        values[name] = value
    return values


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every complete line of events.jsonl.

    A run that was resumed from a checkpoint has a {"kind": "Resumed", "step"} line. Events of later steps that stand
    before this line were lost, and those steps were computed again.
    """
    try:
        with (Path(folder) / EVENTS).open("rb") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue
    except OSError:
        return
