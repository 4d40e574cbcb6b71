"""A sweep as it is stored, for those who show it while it runs. Needs no torch.

Runs in the background train in other processes, so that nobody writes the table when one of them ends: what they have
reached is read from their own folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..runs import layout
from ..runs.control import read_status
from ..storage.bounded_files import Unusable, read_json
from .results import RunResult, as_json, rows_of

FOLDER, STATE, TABLE, CHART = "sweeps", "sweep.json", "table.json", "sweep.png"
MAX_BYTES = 256 << 20  # of sweep.json and of a checkpoint's state
MAX_TABLE_BYTES = 4 << 20
NUM_CACHED = 200


def sweep_folder(output: Path, name: str) -> Path:
    """Return the folder of a sweep."""
    return Path(output) / FOLDER / layout.flat_name(name)


def result_of(folder: Path, values: Mapping[str, str], name: str) -> RunResult:
    """Return what a run that has ended has reached, from its report and its last checkpoint.

    Raises:
        OSError, Unusable, ValueError, KeyError, TypeError: they are missing or damaged.
    """
    report = read_json(folder / layout.REPORT, MAX_BYTES)
    checkpoints = layout.list_checkpoints(folder / layout.CHECKPOINTS)
    state = read_json(checkpoints[-1] / layout.CHECKPOINT_STATE, MAX_BYTES) if checkpoints else {}
    return RunResult(
        values, folder.name, name, report["steps"], report["seconds_per_step"], report["stopped_early"] or "",
        state.get("evaluations", {}), state.get("leaks", {}),
    )  # fmt: skip


def sweep_of_run(output: Path, run: str, name: str) -> dict[str, Any] | None:
    """Return the table of the sweep that a run belongs to; None where it belongs to none.

    Args:
        run: Name of the run's folder.
        name: Name of its LoRA, which begins with that of the sweep.
    """
    return read_sweep(output, name.rpartition("/")[0], run) if "/" in name else None


def read_sweep(output: Path, name: str, run: str = "") -> dict[str, Any] | None:
    """Return a sweep: its fields, and a row for each run that has ended, as in table.json.

    Args:
        run: A run that it must have; "" for any.
    """
    try:
        table = read_json(sweep_folder(output, name) / TABLE, MAX_TABLE_BYTES)
        plans = [(plan["run"], dict(plan["values"]), plan["name"]) for plan in table["plans"]]
    except (OSError, Unusable, KeyError, TypeError, ValueError):
        return None
    if run and run not in [folder for folder, _, _ in plans]:
        return None
    results = [_finished(output, folder, tuple(values.items()), lora) for folder, values, lora in plans]
    runs = as_json(rows_of([result for result in results if result]))
    axes = list(plans[0][1]) if plans else []
    return {"sweep": name, "axes": axes, "planned": len(plans), "plans": table["plans"], "runs": runs}


def _finished(output: Path, run: str, values: tuple[tuple[str, str], ...], name: str) -> RunResult | None:
    if not isinstance(run, str) or not run or Path(run).name != run:
        return None
    folder = layout.runs_folder(output) / run
    status = read_status(folder)
    if status is None or status.state != "finished":
        return None
    try:
        return _read_result(folder, values, name, (folder / layout.REPORT).stat().st_mtime_ns)
    except (OSError, Unusable, ValueError, KeyError, TypeError, AttributeError):
        return None


@lru_cache(maxsize=NUM_CACHED)
def _read_result(folder: Path, values: tuple[tuple[str, str], ...], name: str, changed_ns: int) -> RunResult:
    result = result_of(folder, dict(values), name)
    _ = result.evals, result.leak  # raises if they are damaged
    return result
