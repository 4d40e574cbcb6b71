"""Messages about a running node for the editor: small JSON, at most ten progress messages per second, no step lost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ...trainer_core.host import (
    CheckpointSaved,
    EvalCompared,
    EvalReport,
    Event,
    ImagesScored,
    LeakMeasured,
    LoraSaved,
    MemoryInUse,
    MemoryPlanned,
    Notice,
    PhaseProgress,
    PhaseStarted,
    PreviewReady,
    RunOpened,
    SamplingPreview,
    StepReport,
    SweepReported,
    event_kind,
)
from ...trainer_core.launch.run_queue import Entry
from ...trainer_core.runs import layout
from ...trainer_core.runs.control import read_status
from ...trainer_core.runs.layout import listed_name
from ...trainer_core.storage.stored_names import stored_values

SECONDS = 0.1  # minimum time between two progress messages of the same kind
MEMORY_SECONDS = 1.0  # minimum time between two memory measurements
STEP_FIELDS = ("step", "loss", "learning_rate", "grad_norm", "seconds")


class Feed:
    """A sink that sends events to the editor. Steps are sent in batches, as columns.

    Args:
        send: sends one message, a dict of JSON values.
        node: id of the running node, such as "5", or "12:5" in a subgraph.
        name: name of the LoRA, to distinguish workflows with the same node ids.
        output: ComfyUI's output folder. Images inside it get a URL.
        memory_use: returns the memory in use, in bytes: {"used", "total", "kind"}; None if unknown. Where another
            process trains, its MemoryInUse events take its place.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        send: Callable[[dict[str, Any]], None],
        node: str,
        name: str,
        output: Path,
        memory_use: Callable[[], dict[str, Any] | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._send, self.node, self.name, self._output = send, node, name, output
        self._memory_use, self._clock = memory_use, clock
        self.folder: Path | None = None
        self.started = False
        self._steps: list[StepReport] = []
        self._progress: PhaseProgress | None = None
        self._step_due = self._progress_due = self._memory_due = -math.inf

    @property
    def run(self) -> str:
        """Name of the run's folder, "" before the folder exists."""
        return self.folder.name if self.folder else ""

    def __call__(self, event: Event) -> None:
        now = self._clock()
        if isinstance(event, MemoryInUse):
            use = memory_json(event)
            self._memory_use = lambda: use
        elif isinstance(event, StepReport):
            self._steps.append(event)
            if now >= self._step_due or event.step == event.total:
                self.flush()
        elif isinstance(event, PhaseProgress):
            self._progress = event
            if now >= self._progress_due or event.done == event.total:
                self.flush()
        else:
            self.flush()
            if isinstance(event, RunOpened):
                self.folder = event.folder
            message = message_of(event, self._output)
            if message:
                self._post(message)

    def flush(self) -> None:
        """Send all pending steps and progress."""
        if self._progress:
            progress, self._progress = self._progress, None
            self._post(
                {"kind": "PhaseProgress", "phase": progress.phase, "done": progress.done, "total": progress.total}
            )
            self._progress_due = self._clock() + SECONDS
        if self._steps:
            steps, self._steps = self._steps, []
            columns = {name: [finite(getattr(step, name)) for step in steps] for name in STEP_FIELDS}
            self._post({"kind": "StepReports", "total": steps[-1].total, "steps": columns})
            self._step_due = self._clock() + SECONDS

    def close(self, error: BaseException | None, by_user: bool = False) -> None:
        """Send the end of the run.

        Args:
            error: the exception that ended the run, None if it finished.
            by_user: whether the user paused or stopped the run.
        """
        if not self.started:
            return
        self.flush()
        status = read_status(self.folder) if self.folder else None
        state = "finished" if error is None else "stopped" if by_user else "failed"
        if status and status.state != "running":
            state = status.state
        self._post({"kind": "RunEnded", "state": state, "message": str(error) if state == "failed" else ""})

    def _post(self, message: dict[str, Any]) -> None:
        self.started = True
        if self._clock() >= self._memory_due:
            use = self._memory_use()
            self._memory_due = self._clock() + MEMORY_SECONDS
            if use:
                message = {**message, "memory": use}
        self._send({"node": self.node, "name": self.name, "run": self.run, **message})


def message_of(event: Event, output: Path) -> dict[str, Any] | None:
    """Return an event as JSON values for the editor, or None if the editor does not use it."""
    kind = {"kind": event_kind(event)}
    if isinstance(event, PhaseStarted):
        return {**kind, "phase": event.phase, "total": event.total, "unit": event.unit}
    if isinstance(event, Notice):
        return {**kind, "text": event.text, "level": event.level}
    if isinstance(event, PreviewReady):
        return {**kind, "step": event.step, "url": view_url(event.path, output), "label": label_of(event.path)}
    if isinstance(event, SamplingPreview):
        return {**kind, "step": event.step, "total": event.num_steps, "url": view_url(event.path, output)}
    if isinstance(event, EvalReport | EvalCompared | LeakMeasured | ImagesScored):
        return {**kind, **{name: finite_all(value) for name, value in stored_values(event).items()}}
    if isinstance(event, SweepReported):
        return {**kind, **stored_values(event)}
    if isinstance(event, CheckpointSaved):
        return {**kind, "step": event.step}
    if isinstance(event, LoraSaved):
        file = {"lora": listed_name(event.path, output), "applied": event.applied, "num_keys": event.num_keys}
        return {**kind, **file, **({} if event.what == "LoRA" else {"folder": layout.MODELS})}
    if isinstance(event, MemoryPlanned):
        return {**kind, "device_bytes": event.device_bytes, "ram_bytes": event.ram_bytes}
    return kind if isinstance(event, RunOpened) else None


def waiting_message(entry: Entry) -> dict[str, Any]:
    """Return the message that a run waits in the queue."""
    return {"node": entry.node, "name": entry.name, "run": "", "kind": "RunWaiting"}


def removed_message(entry: Entry) -> dict[str, Any]:
    """Return the message that a run was removed from the queue."""
    return {"node": entry.node, "name": entry.name, "run": "", "kind": "RunEnded", "state": "removed", "message": ""}


def memory_json(use: MemoryInUse) -> dict[str, Any]:
    """Return a measurement as JSON values for the editor."""
    return {"kind": use.memory, "used": use.used, "peak": use.peak, "total": use.total}


def view_url(path: Path, output: Path) -> str:
    """Return ComfyUI's URL of an image in its output folder; "" for an image elsewhere."""
    if not path.is_relative_to(output):
        return ""
    folder = path.parent.relative_to(output).as_posix()
    names = {"filename": path.name, "subfolder": folder, "type": "output"}
    return "/view?" + urlencode(names, errors="surrogateescape")  # a name may not be valid Unicode


def label_of(path: Path) -> str:
    """Return the size in the file name of a grid, such as "64x64" for step-000300-64x64.png."""
    return path.stem.rpartition("-")[2]


def finite(value: float) -> float | None:
    """Return a value, or None if it is not finite, because JSON has no NaN."""
    return value if math.isfinite(value) else None


def finite_all(value: Any) -> Any:
    """Return a value, or a list of them, with None for numbers that are not finite."""
    if isinstance(value, tuple | list):
        return [finite_all(item) for item in value]
    return finite(value) if isinstance(value, float) else value
