"""The values of a workflow that name files of this machine, for running it again here.

What a run publishes holds names instead (runs/portable.py). Their originals are in paths.json in the run's folder,
which is not for publishing: {node id: {field: {"recorded": name, "here": original}}}.

launch.json beside it has the settings that are in no record because they decide who computes and when: devices and
background. The sidebar resumes a run with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config.training import TrainingConfig
from ..storage.atomic import write_json
from ..storage.bounded_files import Unusable, read_json
from .layout import LAUNCH_VALUES, LOCAL_VALUES

MAX_BYTES = 16 << 20


def write_local_values(folder: Path, workflow: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Write the texts of a workflow that differ in its record. Both are in ComfyUI's API format."""
    values: dict[str, dict[str, Any]] = {}
    for node, entry in recorded.items():
        originals = workflow.get(node, {}).get("inputs", {})
        for field, value in entry.get("inputs", {}).items():
            original = originals.get(field)
            if isinstance(original, str) and value and value != original:
                values.setdefault(node, {})[field] = {"recorded": value, "here": original}
    if values:
        write_json(folder / LOCAL_VALUES, values)


def with_local_values(workflow: Any, folder: Path) -> Any:
    """Return a recorded workflow with the values of this machine. Values that were edited since stay as they are."""
    try:
        values = read_json(folder / LOCAL_VALUES, MAX_BYTES)
    except (OSError, Unusable):
        return workflow
    if not isinstance(values, dict) or not isinstance(workflow, dict):
        return workflow
    return {node: _replace(entry, values.get(node)) for node, entry in workflow.items()}


def _replace(entry: Any, values: Any) -> Any:
    if not isinstance(values, dict) or not isinstance(entry, dict) or not isinstance(entry.get("inputs"), dict):
        return entry
    local = {
        field: value["here"]
        for field, value in values.items()
        if isinstance(value, dict) and isinstance(value.get("here"), str)
        and entry["inputs"].get(field, value) == value.get("recorded")
    }  # fmt: skip
    return {**entry, "inputs": {**entry["inputs"], **local}}


def write_launch_values(folder: Path, training: TrainingConfig) -> None:
    """Write the settings that are in no record, if one of them is not the default."""
    defaults = {field.name: field.default for field in fields(training)}
    values = {name: getattr(training, name) for name in TrainingConfig.UNRECORDED}
    if any(value != defaults[name] for name, value in values.items()):
        write_json(folder / LAUNCH_VALUES, values)
        return
    with suppress(OSError):  # of an earlier start
        (folder / LAUNCH_VALUES).unlink(missing_ok=True)


def with_launch_values(workflow: Any, folder: Path, node: str) -> Any:
    """Return a recorded workflow whose trainer has the devices, and runs in the background, as the run was started."""
    entry = workflow.get(node) if isinstance(workflow, dict) else None
    if not isinstance(entry, dict) or not isinstance(entry.get("inputs"), dict):
        return workflow
    try:
        values = read_json(folder / LAUNCH_VALUES, MAX_BYTES)
    except (OSError, Unusable):
        return workflow
    kinds = {field.name: type(field.default) for field in fields(TrainingConfig)}
    is_sound = isinstance(values, dict)
    names = [name for name in TrainingConfig.UNRECORDED if is_sound and type(values.get(name)) is kinds[name]]
    return {**workflow, node: {**entry, "inputs": {**entry["inputs"], **{name: values[name] for name in names}}}}
