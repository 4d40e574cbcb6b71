"""Read access to run folders for the editor: the list of runs, and the history of a run. Needs no torch."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...trainer_core.runs import layout
from ...trainer_core.runs.control import read_status, runs_in
from ...trainer_core.runs.event_log import EVENTS
from .live_events import STEP_FIELDS, finite, label_of, view_url

NUM_RUNS = 200  # most recent runs in the list
NUM_POINTS = 4000  # maximum points of a curve; more steps are averaged
NUM_HISTORIES = 8  # histories cached in memory, so that a poll reads only new events
NUM_NOTICES = 20  # most recent notices in a history


class Backlog:
    """The run folders in output/chroma_trainer.

    Args:
        output: ComfyUI's output folder.
    """

    def __init__(self, output: Path):
        self.output, self.root = output, layout.runs_folder(output)
        self._histories: OrderedDict[str, RunHistory] = OrderedDict()
        self._lock = threading.Lock()  # several threads handle requests

    def folder(self, run: str) -> Path | None:
        """Return the folder of a run, or None if the name is invalid or the path is outside the run folders."""
        if not run or run.startswith(".") or any(mark in run for mark in "/\\:\0"):
            return None
        folder = self.root / run
        is_inside = folder.resolve().is_relative_to(self.root.resolve())
        is_run = is_inside and os.path.isfile(folder / layout.STATUS)  # Path.is_file raises if a name is too long
        return folder if is_run else None

    def runs(self) -> list[dict[str, Any]]:
        """Return the summaries of the runs, most recently active first."""
        return [self.summary(folder) for folder in runs_in(self.output)[:NUM_RUNS] if self.folder(folder.name)]

    def summary(self, folder: Path) -> dict[str, Any]:
        """Return the state, progress, newest image, LoRA and trainer node of a run."""
        status, record = read_status(folder), record_of(folder)
        training = record.get("request", {}).get("training", {})
        name = str(training.get("name") or folder.name.rpartition("-")[0])
        images = sorted((folder / layout.VALIDATION).glob("*.png"))
        lora = layout.lora_path(self.output, name)
        return {
            "run": folder.name,
            "name": name,
            "node": trainer_node(record.get("workflow", {}), name),
            "state": status.state if status else "died",
            "alive": bool(status and status.pid),
            "step": status.step if status else 0,
            "total": status.total if status else 0,
            "phase": status.phase if status else "",
            "updated": status.updated if status else 0,
            "message": status.message if status else "",
            "picture": view_url(images[-1], self.output) if images else "",
            "lora": layout.listed_name(lora, self.output) if lora.is_file() else "",
        }

    def story(self, folder: Path, after: int = 0) -> dict[str, Any]:
        """Return the history of a run.

        Args:
            folder: folder of the run.
            after: last step that the client has. Steps up to it are left out. If it is not 0, so are the settings.
        """
        with self._lock:
            return self._read_history(folder, after)

    def _read_history(self, folder: Path, after: int) -> dict[str, Any]:
        history = self._histories.pop(folder.name, None) or RunHistory(folder)
        self._histories[folder.name] = history
        while len(self._histories) > NUM_HISTORIES:
            self._histories.popitem(last=False)
        history.update()
        record = record_of(folder)
        crops, pairs = folder / layout.CROP_SHEET, folder / layout.PAIR_SHEET
        return {
            "summary": self.summary(folder),
            "steps": thin_out(history.columns(after), NUM_POINTS),
            "checkpoints": history.checkpoints,
            "pictures": [
                self._describe_image(folder, item) for item in history.pictures if (folder / item["path"]).is_file()
            ],
            "lora": history.lora,
            "phase": history.phase,
            "plan": history.plan,
            "notices": history.notices[-NUM_NOTICES:],
            "crops": view_url(crops, self.output) if crops.is_file() else "",
            **({"pairs": view_url(pairs, self.output)} if pairs.is_file() else {}),
            **({} if after else {"settings": record.get("request", {}), "prompt": record.get("workflow", {})}),
        }

    def _describe_image(self, folder: Path, item: Mapping[str, Any]) -> dict[str, Any]:
        path = folder / item["path"]
        modified = int(path.stat().st_mtime)
        return {"step": item["step"], "url": view_url(path, self.output), "label": label_of(path), "changed": modified}


class RunHistory:
    """Contents of events.jsonl. update() reads the new lines.

    After a resume, repeated steps replace the earlier ones.
    """

    def __init__(self, folder: Path):
        self.path = folder / EVENTS
        self._reset()

    def _reset(self) -> None:
        self._offset = 0
        self._steps: list[dict[str, Any]] = []
        self.checkpoints: list[int] = []
        self.pictures: list[dict[str, Any]] = []
        self.notices: list[dict[str, Any]] = []
        self.phase: dict[str, Any] = {}
        self.lora: dict[str, Any] = {}
        self.plan: dict[str, Any] = {}

    def update(self) -> None:
        """Read the new complete lines."""
        try:
            if self.path.stat().st_size < self._offset:  # the file was replaced
                self._reset()
            with self.path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return
        complete = new[: new.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):  # incomplete line of a killed process
                continue

    def _apply(self, event: Mapping[str, Any]) -> None:
        kind = event["kind"]
        if kind == "Resumed":
            self._rewind(event["step"])
        elif kind == "StepReport":
            if self._steps and event["step"] <= self._steps[-1]["step"]:
                self._rewind(event["step"] - 1)
            self._steps.append({name: event[name] for name in STEP_FIELDS})
        elif kind == "RunOpened":
            self.notices = []  # drop the notices of an earlier start
        elif kind == "CheckpointSaved":
            self.checkpoints.append(event["step"])
        elif kind == "PreviewReady":
            self.pictures = [item for item in self.pictures if item["path"] != event["path"]]
            self.pictures.append({"step": event["step"], "path": event["path"]})
        elif kind == "LoraSaved":
            name = event["path"].replace("\\", "/").rpartition(f"/{layout.LORAS}/")[2]
            self.lora = {"lora": name, "applied": event["applied"], "num_keys": event["num_keys"]}
        elif kind == "MemoryPlanned":
            self.plan = {"device_bytes": event["device_bytes"], "ram_bytes": event["ram_bytes"]}
        elif kind == "PhaseStarted":
            self.phase = {"phase": event["phase"], "done": 0, "total": event["total"], "unit": event.get("unit", "")}
        elif kind == "PhaseProgress" and self.phase.get("phase") == event["phase"]:
            self.phase = {**self.phase, "done": event["done"], "total": event["total"]}
        elif kind == "Notice":
            self.notices.append({"text": event["text"], "level": event["level"]})

    def _rewind(self, step: int) -> None:
        self._steps = [item for item in self._steps if item["step"] <= step]
        self.checkpoints = [saved for saved in self.checkpoints if saved <= step]
        self.pictures = [item for item in self.pictures if item["step"] <= step]

    def columns(self, after: int) -> dict[str, list[float | None]]:
        """Return the steps after a step as columns, with None for non-finite values, because JSON has no NaN."""
        steps = [item for item in self._steps if item["step"] > after]
        return {name: [finite(item[name]) for item in steps] for name in STEP_FIELDS}


def thin_out(columns: dict[str, list[Any]], num: int) -> dict[str, list[Any]]:
    """Reduce columns to at most `num` points, each the mean of a group of steps, at the last step of the group."""
    size = -(-len(columns["step"]) // num)
    if size <= 1:
        return columns
    groups = range(0, len(columns["step"]), size)
    return {
        name: [values[min(i + size, len(values)) - 1] if name == "step" else mean(values[i : i + size]) for i in groups]
        for name, values in columns.items()
    }


def mean(values: list[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None if there are none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def trainer_node(workflow: Mapping[str, Any], name: str) -> str:
    """Return the id of the LoRATrainer in the recorded workflow; "" if there is none."""
    trainers = [key for key, node in workflow.items() if node.get("class_type") == "LoRATrainer"]
    with_name = [key for key in trainers if workflow[key]["inputs"].get("name") == name]
    return ([*with_name, *trainers] or [""])[0]


def record_of(folder: Path) -> dict[str, Any]:
    """Return the contents of request.json; {} if it is missing or damaged."""
    path = folder / layout.REQUEST
    try:
        return _read_record(path, path.stat().st_mtime_ns)
    except (OSError, ValueError):
        return {}


@lru_cache(maxsize=2 * NUM_RUNS)
def _read_record(path: Path, changed_ns: int) -> dict[str, Any]:
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise ValueError
    return value
