"""Events of a running node, as messages for the page: small, JSON, at most ten a second, and none lost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ...trainer_core.host import (
    CheckpointSaved,
    Event,
    LoraSaved,
    MemoryPlanned,
    Notice,
    PhaseProgress,
    PhaseStarted,
    PreviewReady,
    RunOpened,
    StepReport,
)
from ...trainer_core.runs.control import read_status

SECONDS = 0.1  # between two messages of the same kind about progress
MEMORY_SECONDS = 1.0  # between two measurements of the memory
STEP_FIELDS = ("step", "loss", "learning_rate", "grad_norm", "seconds")


class Feed:
    """A sink that sends. Steps go out in batches, as columns: every step arrives, in few messages.

    Args:
        send: takes one message, a dict of JSON values.
        node: id of the node that runs, such as "5", or "12:5" in a subgraph.
        name: of the LoRA, to tell apart workflows that number their nodes alike.
        output: ComfyUI's output folder; pictures under it get an address.
        memory_use: bytes of memory in use, {"used", "total", "kind"}; None where it can't be said.
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
        self.begun = False
        self._steps: list[StepReport] = []
        self._progress: PhaseProgress | None = None
        self._step_due = self._progress_due = self._memory_due = -math.inf

    @property
    def run(self) -> str:
        """Name of the run's folder, "" before there is one."""
        return self.folder.name if self.folder else ""

    def __call__(self, event: Event) -> None:
        now = self._clock()
        if isinstance(event, StepReport):
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
        """Send what waits."""
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
        """The node's run is over: finished, paused, stopped (by_user) or failed."""
        if not self.begun:
            return
        self.flush()
        status = read_status(self.folder) if self.folder else None
        state = "finished" if error is None else "stopped" if by_user else "failed"
        if status and status.state != "running":
            state = status.state
        self._post({"kind": "RunEnded", "state": state, "message": str(error) if state == "failed" else ""})

    def _post(self, message: dict[str, Any]) -> None:
        self.begun = True
        if self._clock() >= self._memory_due:
            use = self._memory_use()
            self._memory_due = self._clock() + MEMORY_SECONDS
            if use:
                message = {**message, "memory": use}
        self._send({"node": self.node, "name": self.name, "run": self.run, **message})


def message_of(event: Event, output: Path) -> dict[str, Any] | None:
    """An event as JSON values for the page; None for those it has no use for."""
    kind = {"kind": type(event).__name__}
    if isinstance(event, PhaseStarted):
        return {**kind, "phase": event.phase, "total": event.total, "unit": event.unit}
    if isinstance(event, Notice):
        return {**kind, "text": event.text, "level": event.level}
    if isinstance(event, PreviewReady):
        return {**kind, "step": event.step, "url": view_url(event.path, output), "label": label_of(event.path)}
    if isinstance(event, CheckpointSaved):
        return {**kind, "step": event.step}
    if isinstance(event, LoraSaved):
        return {**kind, "lora": event.path.name, "applied": event.applied, "num_keys": event.num_keys}
    if isinstance(event, MemoryPlanned):
        return {**kind, "device_bytes": event.device_bytes, "ram_bytes": event.ram_bytes}
    return kind if isinstance(event, RunOpened) else None


def view_url(path: Path, output: Path) -> str:
    """ComfyUI's address of a picture under its output folder; "" for one elsewhere."""
    if not path.is_relative_to(output):
        return ""
    folder = path.parent.relative_to(output).as_posix()
    return "/view?" + urlencode({"filename": path.name, "subfolder": folder, "type": "output"})


def label_of(path: Path) -> str:
    """The size in the name of a grid: "64x64" of step-000300-64x64.png."""
    return path.stem.rpartition("-")[2]


def finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None
