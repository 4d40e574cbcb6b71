"""Items in processes of their own.

An illegal memory access ends one of them, a kernel that hangs is killed, and the next item begins.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from items import AT_THE_END, CORRECTNESS, Item
from results import Results, line_of

POLL = 0.05
FAREWELL = 10.0  # seconds that a process has to end by itself
GRACE = 20.0  # seconds that an item may go on when the minutes are over
LOG_LINES = 20
TIME_OVER = "time was over"


class Worker:
    """A process that does what it is told, a line of JSON a task (child.py)."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path):
        self.log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.STDOUT, env=dict(environment),
                start_new_session=True,
            )  # fmt: skip

    @property
    def status(self) -> int | None:
        """None while it lives."""
        return self._process.poll()

    def ask(self, task: Mapping[str, Any]) -> None:
        assert self._process.stdin
        with contextlib.suppress(OSError):  # it is dead already, which is seen at once
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()

    def end(self, patience: float = FAREWELL) -> None:
        """Let it go, then kill whatever of its own processes is left."""
        with contextlib.suppress(OSError):
            assert self._process.stdin
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self._kill()
        self._process.wait()

    def _kill(self) -> None:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()

    def last_lines(self) -> list[str]:
        """Of what it printed."""
        return self.log.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:]


class Runner:
    """Runs items in workers.

    Args:
        command: of a worker. logs: folder for what they print.
        is_shared: one worker for all, as long as nothing fails.
        is_ahead: while an item runs, the next worker starts and imports, so that nobody waits for that.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        logs: Path,
        *,
        is_shared: bool = False,
        is_ahead: bool = False,
    ):
        self._command, self._environment, self._logs = command, environment, logs
        self._is_shared, self._is_ahead = is_shared, is_ahead
        self._answers = tempfile.TemporaryDirectory()
        self._kept: tuple[str, Worker] | None = None  # with the group it works for
        self._next: Worker | None = None
        self._beside: dict[str, Worker] = {}
        logs.mkdir(parents=True, exist_ok=True)
        self._num_workers = len(list(logs.glob("process-*.log")))  # of earlier calls, which entries name

    def run(self, item: Item, context: Mapping[str, Any], patience: float) -> dict[str, Any]:
        """An item's entry; whatever happens, there is one."""
        worker = self._worker_for(item)
        began = time.monotonic()
        self._ask(worker, item, context)
        entry = self._entry(worker, item, began, patience)
        group = "all" if self._is_shared else item.group
        if group and entry["status"] in ("ok", "skipped"):
            self._kept = group, worker
        else:
            worker.end(FAREWELL if entry["status"] in ("ok", "skipped", "failed") else 0)
        return entry

    def start_beside(self, item: Item, context: Mapping[str, Any]) -> None:
        """Let an item run by itself; `collect` has its entry."""
        self._beside[item.name] = worker = self._started()
        self._ask(worker, item, {**context, "is_beside": True})

    def collect(self, item: Item, began: float, patience: float) -> dict[str, Any]:
        """The entry of an item that runs beside the others."""
        worker = self._beside.pop(item.name)
        entry = self._entry(worker, item, began, patience)
        worker.end(0)
        return {**entry, "seconds": entry.get("own_seconds", entry["seconds"])}

    def close(self) -> None:
        """End what still runs."""
        others = [self._next, self._kept[1] if self._kept else None, *self._beside.values()]
        for worker in filter(None, others):
            worker.end(0)
        self._answers.cleanup()

    def _worker_for(self, item: Item) -> Worker:
        kept, self._kept = self._kept, None
        if kept and kept[0] in ("all", item.group) and kept[1].status is None:
            return kept[1]
        if kept:
            kept[1].end()
        worker, self._next = self._next or self._started(), None
        if self._is_ahead:
            self._next = self._started()
        return worker

    def _started(self) -> Worker:
        self._num_workers += 1
        return Worker(self._command, self._environment, self._logs / f"process-{self._num_workers:02}.log")

    def _ask(self, worker: Worker, item: Item, context: Mapping[str, Any]) -> None:
        task = {"name": item.name, "call": item.call, "settings": item.settings, "context": dict(context)}
        worker.ask({**task, "answer": str(self._answer(item)), "part": str(self._part_of_answer(item))})

    def _entry(self, worker: Worker, item: Item, began: float, patience: float) -> dict[str, Any]:
        state = self._awaited(worker, self._answer(item), patience)
        if state == "done":
            entry = json.loads(self._answer(item).read_text("utf-8"))
        else:
            partly = self._part_of_answer(item)
            entry = json.loads(partly.read_text("utf-8")) if partly.is_file() else {}
            entry |= {"status": state, "reason": _reason(state, worker.status, patience), "log": worker.last_lines()}
        return {**entry, "seconds": round(time.monotonic() - began, 1), "process": worker.log.name}

    def _awaited(self, worker: Worker, answer: Path, patience: float) -> str:
        until = time.monotonic() + patience
        while not answer.is_file():
            if worker.status is not None:
                return "done" if answer.is_file() else "died"
            if time.monotonic() > until:
                return "timeout"
            time.sleep(POLL)
        return "done"

    def _answer(self, item: Item) -> Path:
        return Path(self._answers.name) / f"{item.name}.json"

    def _part_of_answer(self, item: Item) -> Path:
        return Path(self._answers.name) / f"{item.name}.part.json"


def _reason(state: str, status: int | None, patience: float) -> str:
    if state == "timeout":
        return f"was ended after {patience:.0f} s"
    if status is not None and status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"


def run_all(
    items: Sequence[Item],
    runner: Runner,
    results: Results,
    context: Mapping[str, Any],
    seconds: float,
    stamp: Mapping[str, Any],
    *,
    expected: Callable[[Item], float] = lambda item: item.seconds,
    slowness: float = 1.0,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> None:
    """Run items one after the other until the seconds are over; results are written after each.

    Args:
        stamp: what every entry says of this call: date and commit.
        expected: seconds that an item is thought to take; it is not begun where fewer are left.
        slowness: factor of the seconds after which an item is ended.
    Items that run beside the others begin first. Those that would disturb what is timed are waited for before figures.
    """
    began = time.monotonic()

    def left() -> float:
        return seconds - (time.monotonic() - began)

    def keep(item: Item, entry: dict[str, Any]) -> None:
        results.add(
            item.name, {"part": item.part, "shows": item.shows, **entry, "expected_seconds": item.seconds, **stamp}
        )
        say(line_of(item.name, entry))

    beside = [item for item in items if item.beside]
    for item in beside:
        runner.start_beside(item, context)

    def collect(all_of_them: bool) -> None:
        for item in [item for item in beside if all_of_them or item.beside != AT_THE_END]:
            beside.remove(item)
            patience = GRACE + max(0.0, min(slowness * item.patience, seconds) - (time.monotonic() - began))
            keep(item, runner.collect(item, began, patience))

    for item in (item for item in items if not item.beside):
        if item.part != CORRECTNESS:
            collect(False)
        if left() < expected(item):
            keep(
                item,
                {"status": "skipped", "reason": f"{TIME_OVER} (it takes about {expected(item):.0f} s)", "seconds": 0.0},
            )
            continue
        keep(item, runner.run(item, context, min(slowness * item.patience, left() + GRACE)))
    collect(True)
