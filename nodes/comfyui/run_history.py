"""Read access to run folders for the editor: the list of runs, and the history of a run. Needs no torch."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...trainer_core.config.adapter import FULL
from ...trainer_core.runs import layout
from ...trainer_core.runs.control import Status, read_status, runs_in
from ...trainer_core.runs.local_values import with_launch_values, with_local_values
from ...trainer_core.storage.bounded_files import Unusable, path_fault, read_json
from ...trainer_core.sweep.stored_sweep import sweep_of_run
from .event_history import RunHistory
from .live_events import label_of, view_url

NUM_RUNS = 200  # most recent runs in the list
NUM_POINTS = 4000  # maximum points of a curve; more steps are averaged
NUM_HISTORIES = 8  # histories cached in memory, so that a poll reads only new events
NUM_DRAWN = 20  # newest images that were asked for
NUM_NOTICES = 20  # most recent notices in a history
RECORD_BYTES = 16 << 20  # of request.json, which holds the workflow
MAX_REASON = 300  # characters
EMPTY_SUMMARY = {
    "run": "", "name": "", "node": "", "state": "unreadable", "alive": False, "step": 0, "total": 0, "phase": "",
    "updated": 0, "message": "", "picture": "", "lora": "",
}  # fmt: skip


class Backlog:
    """The run folders in output/chroma_trainer.

    Args:
        output: ComfyUI's output folder.
    """

    def __init__(self, output: Path):
        self.output, self.root = output, layout.runs_folder(output)
        self._histories: OrderedDict[str, RunHistory] = OrderedDict()
        self._lock = threading.Lock()  # of the dictionary; several threads handle requests

    def folder(self, run: str) -> Path | None:
        """Return the folder of a run, or None if the name is invalid or the path is outside the run folders."""
        if not run or run.startswith(".") or any(mark in run for mark in "/\\:\0"):
            return None
        folder = self.root / run
        is_inside = folder.resolve().is_relative_to(self.root.resolve())
        is_run = is_inside and os.path.lexists(folder / layout.STATUS)  # Path.exists raises if a name is too long
        return folder if is_run else None

    def runs(self) -> list[dict[str, Any]]:
        """Return the summaries of the runs, most recently active first. One odd folder does not affect the others."""
        return [self.summary(folder) for folder in runs_in(self.output)[:NUM_RUNS] if self.folder(folder.name)]

    def summary(self, folder: Path) -> dict[str, Any]:
        """Return the state, progress, newest image, LoRA and trainer node of a run; "unreadable" for a damaged one."""
        name = layout.name_of_run(folder) or folder.name
        try:
            return self._summarize(folder, name)
        except Exception as error:  # a folder may hold anything, and the list of runs must not depend on it
            reason = f"{type(error).__name__}: {error}"[:MAX_REASON]
            return {**EMPTY_SUMMARY, "run": folder.name, "name": name, "message": f"can't be read ({reason})"}

    def _summarize(self, folder: Path, name: str) -> dict[str, Any]:
        status, record = read_status(folder), record_of(folder)
        fault = f"{layout.STATUS} is damaged" if status is None else record.fault
        status = status or Status("unreadable")
        images = sorted(path.name for path in (folder / layout.VALIDATION).glob(f"{layout.STEP}*.png"))
        name = record.name or name
        is_full = object_in(record.request, "adapter").get("kind") == FULL
        lora = (layout.model_path if is_full else layout.lora_path)(self.output, name)
        return {
            "run": folder.name,
            "name": name,
            "node": trainer_node(record.workflow, name),
            "state": "unreadable" if fault else status.state,
            "alive": bool(status.pid),
            "step": status.step,
            "total": status.total,
            "phase": status.phase,
            "updated": status.updated,
            "message": fault or status.message,
            "picture": view_url(folder / layout.VALIDATION / images[-1], self.output) if images else "",
            "lora": layout.listed_name(lora, self.output) if os.path.isfile(lora) else "",
            **({"folder": layout.MODELS} if is_full else {}),
        }

    def story(self, folder: Path, after: int = 0) -> dict[str, Any]:
        """Return the history of a run.

        Args:
            folder: folder of the run.
            after: last step that the client has. Steps up to it are left out. If it is not 0, so are the settings.
        """
        history = self._history_of(folder)
        with history.lock:
            history.update()
            columns, pictures, checkpoints = history.columns(after), history.pictures, list(history.checkpoints)
            evals, leaks = [dict(item) for item in history.evals], [dict(item) for item in history.leaks]
            scores = [dict(item) for item in history.scores]
            lora, phase, plan, notices = history.lora, history.phase, history.plan, history.notices[-NUM_NOTICES:]
        record = record_of(folder)
        crops, pairs = folder / layout.CROP_SHEET, folder / layout.PAIR_SHEET
        return {
            "summary": self.summary(folder),
            "steps": thin_out(columns, NUM_POINTS),
            "checkpoints": checkpoints,
            "evals": evals,
            "leaks": leaks,
            "scores": scores,
            "sweep": sweep_of_run(self.output, folder.name, record.name),
            "drawn": self._drawn(folder),
            "pictures": [image for item in pictures if (image := self._describe_image(folder, item))],
            "lora": lora,
            "phase": phase,
            "plan": plan,
            "notices": notices,
            "crops": view_url(crops, self.output) if os.path.isfile(crops) else "",
            **({"pairs": view_url(pairs, self.output)} if os.path.isfile(pairs) else {}),
            **({} if after else {"settings": record.request, "prompt": _workflow_here(record, folder)}),
        }

    def _history_of(self, folder: Path) -> RunHistory:
        with self._lock:
            history = self._histories.pop(folder.name, None) or RunHistory(folder)
            self._histories[folder.name] = history
            while len(self._histories) > NUM_HISTORIES:
                self._histories.popitem(last=False)
            return history

    def _drawn(self, folder: Path) -> list[dict[str, Any]]:
        """Return the images that were asked for, the newest first."""
        images = []
        for path in (folder / layout.DRAWN).glob(f"{layout.STEP}*.png"):
            step = path.name.removeprefix(layout.STEP).partition("-")[0]
            item = {"path": f"{layout.DRAWN}/{path.name}", "step": int(step) if step.isdecimal() else 0}
            images.append(self._describe_image(folder, item))
        found = [image for image in images if image]
        return sorted(found, key=lambda image: (image["changed"], image["url"]), reverse=True)[:NUM_DRAWN]

    def _describe_image(self, folder: Path, item: Mapping[str, Any]) -> dict[str, Any] | None:
        path = folder / item["path"]
        try:
            modified = int(os.stat(path).st_mtime)
        except (OSError, ValueError):  # it was removed
            return None
        return {"step": item["step"], "url": view_url(path, self.output), "label": label_of(path), "changed": modified}


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
    trainers = {key: node for key, node in workflow.items() if object_in(node).get("class_type") == "LoRATrainer"}
    with_name = [key for key, node in trainers.items() if object_in(node, "inputs").get("name") == name]
    return ([*with_name, *trainers] or [""])[0]


def _workflow_here(record: Record, folder: Path) -> dict[str, Any]:
    """Return the recorded workflow as it was started on this machine."""
    workflow = with_local_values(record.workflow, folder)
    return with_launch_values(workflow, folder, trainer_node(workflow, record.name))


def object_in(value: Any, *names: str) -> dict[str, Any]:
    """Return an object inside nested JSON objects; {} where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Record:
    """The contents of request.json.

    Attributes:
        request: the settings; {} if they are missing or damaged.
        workflow: the workflow, in ComfyUI's API format; {} if it is missing or damaged.
        fault: what is wrong with the file; "" for a sound or missing one.
    """

    request: dict[str, Any] = field(default_factory=dict)
    workflow: dict[str, Any] = field(default_factory=dict)
    fault: str = ""

    @property
    def name(self) -> str:
        """Name of the LoRA; "" if it is not recorded."""
        return str(object_in(self.request, "training").get("name") or "")


def record_of(folder: Path) -> Record:
    """Return the contents of request.json."""
    path = folder / layout.REQUEST
    try:
        return _read_record(path, os.stat(path).st_mtime_ns)
    except OSError:  # it is not written yet
        return Record()


@lru_cache(maxsize=2 * NUM_RUNS)
def _read_record(path: Path, changed_ns: int) -> Record:
    try:
        value = read_json(path, RECORD_BYTES)
    except Unusable as error:
        return Record(fault=f"{layout.REQUEST} {error}"[:MAX_REASON])
    record = Record(object_in(value, "request"), object_in(value, "workflow"))
    name = object_in(record.request, "training").get("name", "")
    is_sound = isinstance(name, str) and not path_fault(name) and "\\" not in name
    is_sound = is_sound and (not name or not {"", ".", ".."} & {*name.split("/")})  # a subfolder, and no way out of it
    is_sound = is_sound and all(isinstance(object_in(value).get(key, {}), dict) for key in ("request", "workflow"))
    is_sound = is_sound and isinstance(value, dict) and isinstance(record.request.get("training", {}), dict)
    return record if is_sound else Record(fault=f"{layout.REQUEST} is damaged")
