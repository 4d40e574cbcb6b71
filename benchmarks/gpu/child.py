"""A process of the kit's: imports, waits, and runs items as it is told, a line of JSON each. Started by runner.py."""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

import contextlib  # noqa: E402
import ctypes  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.append(str(BENCHMARKS))  # models.py

import torch  # noqa: E402
from context import Context, Finding, Skipped  # noqa: E402

SECOND = "CHROMA_TRAINER_SECOND_DEVICE"  # see tests/device/second.py
LINES = 12  # of a traceback
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """A kit that is killed leaves nobody on the device. On Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def import_ahead() -> None:
    """What nearly every item needs. What is at fault is told by the item that needs it."""
    with contextlib.suppress(Exception):
        for name in ("torch._dynamo", "random_runs", "product"):
            importlib.import_module(name)


def device_of(is_rehearsal: bool) -> torch.device:
    """The best there is; in a rehearsal the CPU, or the second device of the tests."""
    from chroma_trainer.trainer_core.devices import pick_device

    if os.environ.get(SECOND):
        folder = str(BENCHMARKS.parent / "tests" / "device")
        if folder not in sys.path:
            sys.path.append(folder)
            import second

            second.register(second.folder())
            second.as_cuda()
        return torch.device("second")
    return pick_device("cpu" if is_rehearsal else "")


def run(task: dict[str, Any], imported: float) -> dict[str, Any]:
    """An item's entry, without the times."""
    began = time.perf_counter()
    try:
        given = task["context"]
        context = Context(
            device_of(given["is_rehearsal"]), given["is_rehearsal"], Path(given["out"]), Path(given["scratch"]),
            given["limit_flops"], given["is_traced"], imported, given.get("is_beside", False),
            tell=lambda figures: write(Path(task["part"]), figures),
        )  # fmt: skip
        module, function = task["call"].split(":")
        finding: Finding = getattr(importlib.import_module(module), function)(context, **task["settings"])
        status = "failed" if finding.faults else "ok"
        entry = {"status": status, "summary": finding.summary, "faults": finding.faults, **finding.figures}
    except Skipped as reason:
        entry = {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        entry = {
            "status": "failed",
            "faults": [f"{type(error).__name__}: {first}"],
            "traceback": traceback.format_exc().splitlines()[-LINES:],
        }
        partly = Path(task["part"])
        entry = (json.loads(partly.read_text("utf-8")) if partly.is_file() else {}) | entry
        traceback.print_exc()
    return entry | {"own_seconds": round(time.perf_counter() - began, 2)}


def write(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all."""
    staging = path.with_suffix(".tmp")
    staging.write_text(json.dumps(plain(value)), "utf-8")
    os.replace(staging, path)


def plain(value: Any) -> Any:
    """As strict JSON knows it: numbers that are not finite become words."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def main() -> None:
    die_with_parent()
    import_ahead()
    imported = round(time.perf_counter() - BEGAN, 2)
    for line in sys.stdin:
        task = json.loads(line)
        print(f"== {task['name']}", flush=True)
        write(Path(task["answer"]), run(task, imported) | {"import_seconds": imported})
    sys.stdout.flush()
    os._exit(0)  # a broken device would have its say in what Python does at the end


if __name__ == "__main__":
    main()
