"""What the page reads of run folders: the list of runs, and the story of one. Reads only; needs no torch."""

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

NUM_RUNS = 200  # the newest ones are listed
NUM_POINTS = 4000  # of a curve; more steps are averaged
NUM_STORIES = 8  # kept in memory, so that a poll reads only what is new
NUM_NOTICES = 20


class Backlog:
    """The run folders under output/chroma_trainer."""

    def __init__(self, output: Path):
        self.output, self.root = output, layout.runs_folder(output)
        self._stories: OrderedDict[str, RunHistory] = OrderedDict()
        self._lock = threading.Lock()  # requests are answered by several threads

    def folder(self, run: str) -> Path | None:
        """The run's folder; None for a name that is none, or leads elsewhere."""
        if not run or run.startswith(".") or any(mark in run for mark in "/\\:\0"):
            return None
        folder = self.root / run
        inside = folder.resolve().is_relative_to(self.root.resolve())
        return (
            folder if inside and os.path.isfile(folder / layout.STATUS) else None
        )  # Path.is_file raises on a name too long

    def runs(self) -> list[dict[str, Any]]:
        """Summaries, the run that was worked on last first."""
        return [self.summary(folder) for folder in runs_in(self.output)[:NUM_RUNS] if self.folder(folder.name)]

    def summary(self, folder: Path) -> dict[str, Any]:
        """State, progress, newest picture and LoRA of a run, and which node of which workflow it was."""
        status, record = read_status(folder), record_of(folder)
        training = record.get("request", {}).get("training", {})
        name = str(training.get("name") or folder.name.rpartition("-")[0])
        pictures = sorted((folder / layout.VALIDATION).glob("*.png"))
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
            "picture": view_url(pictures[-1], self.output) if pictures else "",
            "lora": lora.name if lora.is_file() else "",
        }

    def story(self, folder: Path, after: int = 0) -> dict[str, Any]:
        """All that happened. after: a step; leaves out what a page that asked before has got: earlier steps and the settings."""
        with self._lock:
            return self._story(folder, after)

    def _story(self, folder: Path, after: int) -> dict[str, Any]:
        story = self._stories.pop(folder.name, None) or RunHistory(folder)
        self._stories[folder.name] = story
        while len(self._stories) > NUM_STORIES:
            self._stories.popitem(last=False)
        story.update()
        record = record_of(folder)
        crops, pairs = folder / layout.CROP_SHEET, folder / layout.PAIR_SHEET
        return {
            "summary": self.summary(folder),
            "steps": thin_out(story.columns(after), NUM_POINTS),
            "checkpoints": story.checkpoints,
            "pictures": [self._picture(folder, item) for item in story.pictures if (folder / item["path"]).is_file()],
            "lora": story.lora,
            "phase": story.phase,
            "plan": story.plan,
            "notices": story.notices[-NUM_NOTICES:],
            "crops": view_url(crops, self.output) if crops.is_file() else "",
            **({"pairs": view_url(pairs, self.output)} if pairs.is_file() else {}),
            **({} if after else {"settings": record.get("request", {}), "prompt": record.get("workflow", {})}),
        }

    def _picture(self, folder: Path, item: Mapping[str, Any]) -> dict[str, Any]:
        path = folder / item["path"]
        changed = int(path.stat().st_mtime)
        return {"step": item["step"], "url": view_url(path, self.output), "label": label_of(path), "changed": changed}


class RunHistory:
    """events.jsonl, read as far as it goes; update() reads on from there. Steps that a resume repeated are told once."""

    def __init__(self, folder: Path):
        self.path = folder / EVENTS
        self._forget()

    def _forget(self) -> None:
        self._offset = 0
        self._steps: list[dict[str, Any]] = []
        self.checkpoints: list[int] = []
        self.pictures: list[dict[str, Any]] = []
        self.notices: list[dict[str, Any]] = []
        self.phase: dict[str, Any] = {}
        self.lora: dict[str, Any] = {}
        self.plan: dict[str, Any] = {}

    def update(self) -> None:
        """Take in the whole lines that are new."""
        try:
            if self.path.stat().st_size < self._offset:  # another file by that name
                self._forget()
            with self.path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):  # half a line of a process that was killed
                continue

    def _take(self, event: Mapping[str, Any]) -> None:
        kind = event["kind"]
        if kind == "Resumed":
            self._rewind(event["step"])
        elif kind == "StepReport":
            if self._steps and event["step"] <= self._steps[-1]["step"]:
                self._rewind(event["step"] - 1)
            self._steps.append({name: event[name] for name in STEP_FIELDS})
        elif kind == "RunOpened":
            self.notices = []  # what an earlier start warned of
        elif kind == "CheckpointSaved":
            self.checkpoints.append(event["step"])
        elif kind == "PreviewReady":
            self.pictures = [item for item in self.pictures if item["path"] != event["path"]]
            self.pictures.append({"step": event["step"], "path": event["path"]})
        elif kind == "LoraSaved":
            name = event["path"].replace("\\", "/").rpartition("/")[2]
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
        """Steps after that one, as columns. JSON knows no NaN: None."""
        steps = [item for item in self._steps if item["step"] > after]
        return {name: [finite(item[name]) for item in steps] for name in STEP_FIELDS}


def thin_out(columns: dict[str, list[Any]], num: int) -> dict[str, list[Any]]:
    """At most num points: means of neighbours, at the last one's step."""
    size = -(-len(columns["step"]) // num)
    if size <= 1:
        return columns
    groups = range(0, len(columns["step"]), size)
    return {
        name: [values[min(i + size, len(values)) - 1] if name == "step" else mean(values[i : i + size]) for i in groups]
        for name, values in columns.items()
    }


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def trainer_node(workflow: Mapping[str, Any], name: str) -> str:
    """Id of the LoRATrainer in the recorded workflow; "" where there is none."""
    trainers = [key for key, node in workflow.items() if node.get("class_type") == "LoRATrainer"]
    named = [key for key in trainers if workflow[key]["inputs"].get("name") == name]
    return ([*named, *trainers] or [""])[0]


def record_of(folder: Path) -> dict[str, Any]:
    """request.json; {} where it is not there or damaged."""
    path = folder / layout.REQUEST
    try:
        return _record(path, path.stat().st_mtime_ns)
    except (OSError, ValueError):
        return {}


@lru_cache(maxsize=2 * NUM_RUNS)
def _record(path: Path, changed_ns: int) -> dict[str, Any]:
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise ValueError
    return value
