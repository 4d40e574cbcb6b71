"""Kill training jobs with SIGKILL at random instants, let them go on, and compare every byte with a job that nobody touched.

The same for Ctrl-C whose console is gone, as under `| tee`, and for a terminal that is closed (SIGHUP).

Used by tests/faults/test_kills.py and benchmarks/faults.py.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NURSERY = Path(__file__).with_name("nursery.py")
NAME = "killed"
CANCELLED = 130
HANGS_SECONDS = 120
SAVES = ("checkpoints", "loras")


@dataclass
class Count:
    """Kills that hit a live process; those after which the finished files were the same; the others, each with its reason."""

    tried: int = 0
    inside_a_save: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = f"kills: {self.tried} tried ({self.inside_a_save} inside a save), {self.survived} survived, {len(self.lost)} lost"
        return "\n".join([told, *self.lost])


class Nursery:
    """Starts jobs. Use as a context."""

    def __init__(self, home: Path):
        self.home = home  # has workflow.json, models/ and pictures/

    def __enter__(self) -> Nursery:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(NURSERY)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._read() == {"ready": True}
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()

    def _read(self) -> dict:
        assert self.process.stdout
        assert select.select([self.process.stdout], [], [], HANGS_SECONDS)[0], "the job hangs"
        line = self.process.stdout.readline()
        assert line, "the nursery died"
        return json.loads(line)

    def _write(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def start(
        self,
        output: Path,
        *,
        kill_at: int = 0,
        full_at: int = 0,
        within: tuple[str, ...] = SAVES,
        count: Path | None = None,
        console: str = "",
        settings: tuple[str, ...] = (),
    ) -> int:
        """Begin a job whose results, caches included, go to output. Returns its process id; then call wait()."""
        arguments = [
            "run",
            str(self.home / "workflow.json"),
            "--models",
            str(self.home / "models"),
            "--output",
            str(output),
        ]
        arguments += [f"--set={setting}" for setting in settings]
        job = {
            "arguments": arguments, "folder": str(self.home), "kill_at": kill_at, "full_at": full_at, "within": within,
            "count": str(count or ""), "console": console,
        }  # fmt: skip
        self._write(json.dumps(job))
        return self._read()["pid"]

    def wait(self) -> int:
        """Exit status of the job; the negative number of a signal that ended it."""
        self._write("wait")
        return os.waitstatus_to_exitcode(self._read()["status"])

    def run(self, output: Path, **values) -> int:
        self.start(output, **values)
        return self.wait()


def finished(output: Path) -> dict[str, bytes]:
    """What must be the same: the LoRA, the last checkpoint (adapter, optimiser, history), the validation pictures;
    and nothing else, such as what a kill left, lies in the folder of LoRAs, which other programs list."""
    (run,) = (output / "chroma_trainer").glob(f"{NAME}-*")
    last = max((run / "checkpoints").glob("step-*"))
    files = [*(output / "loras").iterdir(), *last.iterdir(), *sorted((run / "validation").iterdir())]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


def kill_many(home: Path, results: Path, kills: int, inside: int, seed: int, told=lambda text: None) -> Count:
    """At least `kills` kills, `inside` of them at a file operation of a save; about every third start is killed again on its way.

    Args:
        home: with workflow.json, models/ and the dataset.
        results: an empty folder.
        told: called with a line of progress.
    """
    draw = random.Random(seed)
    count = Count()
    with Nursery(home) as nursery:
        began = time.perf_counter()
        assert nursery.run(results / "whole", count=results / "operations") == 0, (home / "log.txt").read_text("utf-8")[
            -3000:
        ]
        seconds = time.perf_counter() - began
        operations = int((results / "operations").read_text())
        wanted = finished(results / "whole")
        while count.tried < kills:
            output = results / f"trial-{count.tried}"
            history: list[str] = []
            while not history or draw.random() < 1 / 3:
                is_inside = count.inside_a_save < inside and (draw.random() < 0.6 or kills - count.tried <= inside)
                if is_inside:
                    at = draw.randint(1, operations)
                    status, what = nursery.run(output, kill_at=at), f"at operation {at} of {operations}"
                else:
                    delay = draw.uniform(0, seconds)
                    pid = nursery.start(output)
                    time.sleep(delay)
                    os.kill(pid, signal.SIGKILL)
                    status, what = nursery.wait(), f"after {delay:.3f} s of {seconds:.3f}"
                if status != -signal.SIGKILL:  # it was over before
                    break
                count.tried += 1
                count.inside_a_save += is_inside
                history.append(what)
            fault = _fault(nursery, output, wanted)
            if fault:
                count.lost += [f"{', then '.join(history)}: {fault}"] * len(history)
            else:
                count.survived += len(history)
            told(str(count).splitlines()[0])
    return count


@dataclass
class Interruptions:
    """Interruptions that hit a live process; how many of them it ended for; those after which something was lost."""

    tried: int = 0
    canceled: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)


@contextmanager
def pipe(folder: Path) -> Iterator[tuple[str, int]]:
    """A pipe, as of `| tee`: the path of its end for writing, and the descriptor of the other."""
    path = folder / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield str(path), reader
    finally:
        path.unlink()


@contextmanager
def terminal(folder: Path) -> Iterator[tuple[str, int]]:
    """A terminal: its path, and the descriptor whose closing hangs up."""
    master, terminal = os.openpty()
    try:
        yield os.ttyname(terminal), master
    finally:
        os.close(terminal)


def interrupt_many(home: Path, results: Path, number: int, closed_terminal: bool, seed: int) -> Interruptions:
    """Take the console from a run at a random instant, and end it: by Ctrl-C, or by the SIGHUP of the closed terminal.

    The run ends with status 130 and no traceback, with a LoRA if it trained a step. The next start writes the same
    bytes as a run that nobody touched.

    Args:
        home: with workflow.json, models/ and the dataset.
        results: an empty folder.
        number: interruptions.
        closed_terminal: the console is a terminal, and closing it is all that happens; else a pipe, then SIGINT.
        seed: of the instants.
    """
    draw = random.Random(seed)
    count = Interruptions()
    with Nursery(home) as nursery:
        began = time.perf_counter()
        assert nursery.run(results / "whole") == 0
        seconds = time.perf_counter() - began
        wanted = finished(results / "whole")
        while count.tried < number:
            output = results / f"trial-{count.tried}"
            delay = draw.uniform(0.02, seconds)
            with (terminal if closed_terminal else pipe)(results) as (console, reader):
                pid = nursery.start(output, console=console)
                _read_for(reader, delay)
                os.close(reader)
                if not closed_terminal:
                    os.kill(pid, signal.SIGINT)
                status = nursery.wait()
            if status == 0:  # it was over before
                shutil.rmtree(output)
                continue
            count.tried += 1
            count.canceled += status == CANCELLED
            if fault := _fault_of_end(home, output, status) or _fault(nursery, output, wanted):
                count.lost.append(f"after {delay:.3f} s of {seconds:.3f}: {fault}")
            else:
                count.survived += 1
    return count


def _read_for(reader: int, seconds: float) -> None:
    """Read what a job prints until its console is open, and then for some seconds."""
    until = 0.0
    while not until or time.monotonic() < until:
        wait = until - time.monotonic() if until else HANGS_SECONDS
        if select.select([reader], [], [], max(0, wait))[0]:
            raw = os.read(reader, 65536)
            assert raw or until, "no job opened the console"
            if not raw:  # the job is over
                return
            until = until or time.monotonic() + seconds
        assert until, "the job hangs"


def _fault_of_end(home: Path, output: Path, status: int) -> str:
    """What is wrong with how a run ended; before it listens to signals, the system ends it."""
    events = [event for path in output.glob("chroma_trainer/*/events.jsonl") for event in path.read_text().splitlines()]
    steps = sum('"kind": "StepReport"' in event for event in events)
    if status not in (CANCELLED, -signal.SIGHUP):
        return f"it ended with {status}: {(home / 'log.txt').read_text('utf-8')[-1500:]}"
    if status == CANCELLED and steps and not list(output.glob("loras/*.safetensors")):
        return f"no LoRA after {steps} steps"
    return ""


def _fault(nursery: Nursery, output: Path, wanted: dict[str, bytes]) -> str:
    status = nursery.run(output)
    if status != 0:
        return f"the next start ended with {status}: {(nursery.home / 'log.txt').read_text('utf-8')[-1500:]}"
    found = finished(output)
    if found.keys() != wanted.keys():
        return f"other files: {sorted(found.keys() ^ wanted.keys())}"
    other = [name for name in wanted if found[name] != wanted[name]]
    if other and all(_without_last_loss(found, name) == _without_last_loss(wanted, name) for name in other):
        return ""
    return f"other bytes in {', '.join(other)}" if other else ""


def _without_last_loss(files: dict[str, bytes], name: str) -> object:
    """A file's content but for the last step's loss on held-out images: a cancel during it saves the step without it, and the
    next start measures it for the report and the best LoRA alone (docs/decisions/0050)."""
    if not name.endswith(("/state.json", "/manifest.json")):
        return files[name]
    content = json.loads(files[name])
    if name.endswith("/state.json"):
        for losses in (content["eval_losses"], content.get("evaluations", {})):
            losses.pop(str(content["step"]), None)
    else:
        content = {key: value for key, value in _flat(content).items() if "state.json" not in key}
    return content


def _flat(content: object, path: str = "") -> dict[str, object]:
    if not isinstance(content, dict):
        return {path: content}
    return {key: value for name, item in content.items() for key, value in _flat(item, f"{path}/{name}").items()}
