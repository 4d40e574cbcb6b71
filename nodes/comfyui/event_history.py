"""What events.jsonl of a run says, read in bounded time and memory, and only regular files.

A file that has grown by more than MAX_READ since the last look is not read whole: its end is, and samples before it.
The curve then has fewer points there, and checkpoints and images come from the folder.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ...trainer_core.host import (
    CheckpointSaved,
    EvalCompared,
    EvalReport,
    ImagesScored,
    LeakMeasured,
    LoraSaved,
    MemoryPlanned,
    Notice,
    PhaseProgress,
    PhaseStarted,
    PreviewReady,
    RunOpened,
    StepReport,
    event_kind,
)
from ...trainer_core.runs import layout
from ...trainer_core.runs.event_log import RESUMED
from ...trainer_core.storage.bounded_files import Unusable, open_regular, parse_json
from .live_events import STEP_FIELDS, finite

MAX_READ = 8 << 20  # bytes read in one piece: 55,000 steps, 0.3 s
NUM_SAMPLES, SAMPLE_BYTES = 200, 4 << 10  # of a part that is not read whole
MAX_STEPS = 100_000  # in memory; more are thinned, the older half first
MAX_TEXT = 4000  # characters of a notice
MAX_NOTICES = 200  # in memory
MAX_EVALS = 1000  # in memory
MAX_SIGMAS, MAX_PROMPTS = 16, 100  # of an evaluation
SCORE_NUMBERS = (
    "clip", "clip_error", "clip_change", "clip_change_error", "likeness", "likeness_error", "likeness_change",
    "likeness_change_error",
)  # fmt: skip


class RunHistory:
    """Contents of events.jsonl. update() reads the new lines.

    After a resume, repeated steps replace the earlier ones.

    Attributes:
        lock: hold it while calling update() and while reading the fields.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / layout.EVENTS
        self.lock = threading.Lock()
        self._file_id: tuple[int, int] = (0, 0)
        self._reset()

    def _reset(self) -> None:
        self._offset = 0
        self._steps: list[dict[str, Any]] = []
        self._images: dict[str, int] = {}  # path -> step, in the order of events
        self.checkpoints: list[int] = []
        self.evals: list[dict[str, Any]] = []  # each with the fields of EvalReport, and of EvalCompared if there is one
        self.leaks: list[dict[str, Any]] = []  # each with the fields of LeakMeasured
        self.scores: list[dict[str, Any]] = []  # each with the fields of ImagesScored
        self.notices: list[dict[str, Any]] = []
        self.phase: dict[str, Any] = {}
        self.lora: dict[str, Any] = {}
        self.plan: dict[str, Any] = {}

    @property
    def pictures(self) -> list[dict[str, Any]]:
        """Step and path, relative to the run's folder, of each validation image."""
        return [{"step": step, "path": path} for path, step in self._images.items()]

    def update(self) -> None:
        """Read the new complete lines."""
        try:
            handle = open_regular(self.path)
        except (OSError, Unusable):
            return
        with os.fdopen(handle, "rb") as file:
            about = os.fstat(handle)
            if about.st_size < self._offset or (about.st_dev, about.st_ino) != self._file_id:  # the file was replaced
                self._reset()
                self._file_id = (about.st_dev, about.st_ino)
            if about.st_size - self._offset > MAX_READ:
                self._skim(file, about.st_size - MAX_READ // 2)
            file.seek(self._offset)
            new = file.read(MAX_READ)
        complete = new[: new.rfind(b"\n") + 1]
        self._offset += len(complete)
        self._apply_lines(complete)

    def _skim(self, file: BinaryIO, end: int) -> None:
        """Take samples of the file from the offset to `end`, and move the offset there."""
        stride = (end - self._offset) // NUM_SAMPLES
        for number in range(NUM_SAMPLES):
            file.seek(self._offset + number * stride)
            sample = file.read(SAMPLE_BYTES)
            self._apply_lines(sample[sample.find(b"\n") + 1 : sample.rfind(b"\n") + 1])
        file.seek(end)
        self._offset = end + len(file.readline(MAX_READ // 4))
        steps = [layout.step_of(path) for path in layout.list_checkpoints(self.folder / layout.CHECKPOINTS)]
        self.checkpoints = sorted({*self.checkpoints, *steps})
        for path in sorted((self.folder / layout.VALIDATION).glob(f"{layout.STEP}*.png")):
            number = path.name.removeprefix(layout.STEP).partition("-")[0]
            if number.isdecimal():
                self._images.setdefault(f"{layout.VALIDATION}/{path.name}", int(number))

    def _apply_lines(self, lines: bytes) -> None:
        for line in lines.splitlines():
            try:
                self._apply(parse_json(line, finite=False))
            # an incomplete line of a killed process, or a damaged one
            except (ValueError, KeyError, TypeError, AttributeError):
                continue

    def _apply(self, event: Mapping[str, Any]) -> None:
        apply = APPLY.get(event["kind"])
        if apply:
            apply(self, event)

    def _resume(self, event: Mapping[str, Any]) -> None:
        self._rewind(_whole(event["step"]))

    def _report_step(self, event: Mapping[str, Any]) -> None:
        self._add_step({name: _number(event[name]) for name in STEP_FIELDS} | {"step": _whole(event["step"])})

    def _open_run(self, _: Mapping[str, Any]) -> None:
        self.notices = []  # drop the notices of an earlier start

    def _add_checkpoint(self, event: Mapping[str, Any]) -> None:
        self.checkpoints.append(_whole(event["step"]))

    def _add_eval(self, event: Mapping[str, Any]) -> None:
        step = _whole(event["step"])
        self.evals = _without(self.evals, step)
        numbers = {name: _number(event[name]) for name in ("loss", "standard_error")}
        _insert(self.evals, {"step": step, **numbers, "held_out": event["held_out"] is True})

    def _compare_eval(self, event: Mapping[str, Any]) -> None:
        if not self.evals or self.evals[-1]["step"] != _whole(event["step"]):
            return
        whole = {name: _whole(event[name]) for name in ("best", "waiting", "gap_since")}
        numbers = {name: _number(event[name]) for name in ("change", "change_error", "trained")}
        lists = {name: [_number(v) for v in event[name][:MAX_SIGMAS]] for name in ("sigmas", "gaps", "gap_errors")}
        self.evals[-1] |= {**whole, **numbers, **lists, "overfits": event["overfits"] is True}

    def _add_leak(self, event: Mapping[str, Any]) -> None:
        step = _whole(event["step"])
        numbers = {name: _number(event[name]) for name in ("leak", "standard_error", "moved_with", "moved_without")}
        lists = {name: [_number(v) for v in event[name][:MAX_SIGMAS]] for name in ("sigmas", "by_sigma")}
        self.leaks = _without(self.leaks, step)
        _insert(self.leaks, {"step": step, **numbers, **lists})

    def _add_scores(self, event: Mapping[str, Any]) -> None:
        step, strength = _whole(event["step"]), _number(event["strength"])
        numbers = {name: _number(event[name]) for name in SCORE_NUMBERS}
        prompts = [_text(name) for name in event["prompts"][:MAX_PROMPTS]]
        by_prompt = [_number(v) for v in event["by_prompt"][:MAX_PROMPTS]]
        same = {"step": step, "strength": strength}
        self.scores = [item for item in self.scores if not same.items() <= item.items()][-MAX_EVALS:]
        shown = {"is_shown": event["is_shown"] is True, "prompts": prompts, "by_prompt": by_prompt}
        _insert(self.scores, {**same, **numbers, **shown})

    def _add_image(self, event: Mapping[str, Any]) -> None:
        path = _inside(event["path"])
        self._images.pop(path, None)
        self._images[path] = _whole(event["step"])

    def _save_lora(self, event: Mapping[str, Any]) -> None:
        path = _text(event["path"]).replace("\\", "/")
        folder = layout.MODELS if f"/{layout.MODELS}/" in path else layout.LORAS
        name = path.rpartition(f"/{folder}/")[2]
        self.lora = {"lora": name, "applied": _whole(event["applied"]), "num_keys": _whole(event["num_keys"])}
        if folder != layout.LORAS:
            self.lora["folder"] = folder

    def _plan_memory(self, event: Mapping[str, Any]) -> None:
        self.plan = {name: _whole(event[name]) for name in ("device_bytes", "ram_bytes")}

    def _start_phase(self, event: Mapping[str, Any]) -> None:
        total, unit = _whole(event["total"]), _text(event.get("unit", ""))
        self.phase = {"phase": _text(event["phase"]), "done": 0, "total": total, "unit": unit}

    def _continue_phase(self, event: Mapping[str, Any]) -> None:
        if self.phase.get("phase") == event["phase"]:
            self.phase = {**self.phase, "done": _whole(event["done"]), "total": _whole(event["total"])}

    def _add_notice(self, event: Mapping[str, Any]) -> None:
        self.notices = self.notices[-MAX_NOTICES:]
        self.notices.append({"text": _text(event["text"]), "level": _text(event["level"])})

    def _add_step(self, values: dict[str, Any]) -> None:
        if self._steps and values["step"] <= self._steps[-1]["step"]:
            self._rewind(values["step"] - 1)
        if len(self._steps) >= MAX_STEPS:
            half = MAX_STEPS // 2
            self._steps = self._steps[:half:2] + self._steps[half:]
        self._steps.append(values)

    def _rewind(self, step: int) -> None:
        for items in (self._steps, self.evals, self.leaks, self.scores):
            while items and items[-1]["step"] > step:
                items.pop()
        while self.checkpoints and self.checkpoints[-1] > step:
            self.checkpoints.pop()
        while self._images and next(reversed(self._images.values())) > step:
            self._images.popitem()

    def columns(self, after: int) -> dict[str, list[float | None]]:
        """Return the steps after a step as columns, with None for non-finite values, because JSON has no NaN."""
        steps = [item for item in self._steps if item["step"] > after]
        return {name: [item[name] for item in steps] for name in STEP_FIELDS}


# The kinds of lines that are read, by the names under which event_log.py writes them.
APPLY: dict[str, Callable[[RunHistory, Mapping[str, Any]], None]] = {
    RESUMED: RunHistory._resume,
    event_kind(StepReport): RunHistory._report_step,
    event_kind(RunOpened): RunHistory._open_run,
    event_kind(CheckpointSaved): RunHistory._add_checkpoint,
    event_kind(EvalReport): RunHistory._add_eval,
    event_kind(EvalCompared): RunHistory._compare_eval,
    event_kind(LeakMeasured): RunHistory._add_leak,
    event_kind(ImagesScored): RunHistory._add_scores,
    event_kind(PreviewReady): RunHistory._add_image,
    event_kind(LoraSaved): RunHistory._save_lora,
    event_kind(MemoryPlanned): RunHistory._plan_memory,
    event_kind(PhaseStarted): RunHistory._start_phase,
    event_kind(PhaseProgress): RunHistory._continue_phase,
    event_kind(Notice): RunHistory._add_notice,
}


def _without(items: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Return the newest items without that of a step, which is measured again. A resumed run measures step 0 again."""
    return [item for item in items if item["step"] != step][-MAX_EVALS:]


def _insert(items: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """Add an item after those of its step and of earlier ones."""
    items.append(item)
    items.sort(key=lambda other: other["step"])  # stable


def _whole(value: Any) -> int:
    if type(value) is not int or not -1 <= value < 1 << 53:
        raise TypeError
    return value


def _number(value: Any) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300):
        return None
    return None if value is None else finite(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value[:MAX_TEXT]


def _inside(value: Any) -> str:
    """Return the path of a file in the run's folder.

    Raises:
        TypeError: it is none.
    """
    path = _text(value).replace("\\", "/")
    path.encode("utf-8")  # raises ValueError
    if path.startswith("/") or ":" in path or "\0" in path or ".." in path.split("/"):
        raise TypeError
    return path
