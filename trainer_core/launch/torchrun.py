"""Start the processes of a run.

Several of them are started by torchrun (torch.distributed.run): if one of them ends with an error, it ends the others.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distributed.device_list import DEVICES_VARIABLE
from ..host import PACKAGE, Machines
from ..runs.lock import is_held
from .job import LOG, LOGS

SINGLE = Machines()
SHUTDOWN_SECONDS = 300  # for the step in progress and a checkpoint, before torchrun kills the processes
TAIL_BYTES = 4000  # of a log that is shown
FAILED = re.compile(r"exitcode: (-?\d+)\) local_rank: (\d+)")


@dataclass
class Processes:
    """The processes of this machine. They end after the current step when their standard input is closed.

    Args:
        folder: has job.json.
        process: torchrun, or the only process that trains; None if another program started it, which has ended.
        uses_torchrun: whether there are several.
    """

    folder: Path
    process: subprocess.Popen[Any] | None
    uses_torchrun: bool = True

    @classmethod
    def start(
        cls, folder: Path, devices: Sequence[str], machines: Machines = SINGLE, is_detached: bool = False
    ) -> Processes:
        """Start one process for each device.

        Args:
            folder: has job.json.
            devices: name of each process's device.
            machines: the machines that train together.
            is_detached: whether they go on when this process ends.
        """
        uses_torchrun = len(devices) > 1 or machines.count > 1
        command = [str(PACKAGE / "cli.py"), "worker", str(folder)]
        if uses_torchrun:
            options = [*options_of(len(devices), machines), "--log-dir", str(folder / LOGS), "--redirects", "3"]
            command = ["-m", "torch.distributed.run", *options, *command]
        environment = {**os.environ, DEVICES_VARIABLE: ",".join(devices), **_environment()}
        with (folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL if is_detached else subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=str(Path.cwd()),
                **_apart(is_detached),
            )
        return cls(folder, process, uses_torchrun)

    @property
    def are_running(self) -> bool:
        return is_held(self.folder) if self.process is None else self.process.poll() is None

    def stop_after_step(self) -> None:
        """Let the processes end after the current step, with a checkpoint and a LoRA."""
        if self.process and self.process.stdin and not self.process.stdin.closed:
            self.process.stdin.close()

    def stop_now(self) -> None:
        """End the processes as a second Ctrl-C does."""
        self.stop_after_step()
        if self.process and self.are_running:
            self.process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        if self.process:
            self.process.wait()
        self.stop_after_step()

    def killed(self) -> list[str]:
        """Return which processes of this machine were ended by a signal."""
        return [text for code, text in self._endings() if code < 0]

    def describe_failure(self) -> str:
        """Return which processes failed, and the last lines that the first of them printed."""
        failures = dict.fromkeys(text for _, text in self._endings())
        ends = [end for path in self._logs() if (end := _last_error(_tail(path)))]
        return "; ".join([*failures, *ends[:1]]) or _last_error(_tail(self.folder / LOG)) or "torchrun failed"

    def save_log(self, path: Path) -> None:
        """Copy what the first process printed, because the temporary folder is removed."""
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._logs()[0], path)

    def _endings(self) -> list[tuple[int, str]]:
        """Return the exit code of each process that failed, and what it means."""
        if not self.uses_torchrun:
            code = self.process.returncode if self.process else 0
            return [(code, f"it {_ending(code)}")] if code else []
        codes = [(int(code), rank) for code, rank in FAILED.findall(_tail(self.folder / LOG))]
        return [(code, f"process {rank} of this machine {_ending(code)}") for code, rank in codes]

    def _logs(self) -> list[Path]:
        """Return what the processes printed, in the order of their ranks."""
        return sorted((self.folder / LOGS).rglob("stderr.log")) or [self.folder / LOG]


def options_of(count: int, machines: Machines) -> list[str]:
    """Return torchrun's options for `count` processes on this machine."""
    options = ["--nproc-per-node", str(count), "--max-restarts", "0"]
    if machines.count == 1:
        return ["--standalone", *options]
    host, _, port = machines.meeting.rpartition(":")
    meeting = ["--master-addr", host, "--master-port", port]
    return ["--nnodes", str(machines.count), "--node-rank", str(machines.number), *meeting, *options]


def _environment() -> dict[str, str]:
    """Return variables for the processes. The user's own values come first."""
    import torch

    values = {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
        # torchrun would set 1. On a CPU the last bits depend on the number of threads: take that of one process.
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        **({"USE_LIBUV": "0"} if sys.platform == "win32" else {}),  # torch for Windows is built without it
    }
    if sys.flags.no_user_site:  # python -s, as ComfyUI's portable version is started
        values["PYTHONNOUSERSITE"] = "1"
    return {name: os.environ.get(name) or value for name, value in values.items()}


def _apart(is_detached: bool) -> dict[str, Any]:
    """Return arguments of Popen with which Ctrl-C in the terminal reaches this process alone.

    On Windows a detached process has no console either, because closing a console ends all processes in it.
    """
    if sys.platform == "win32":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP
        return {"creationflags": flags | (subprocess.CREATE_NO_WINDOW if is_detached else 0)}
    return {"start_new_session": True}


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name if -code in {int(number) for number in signal.Signals} else f"signal {-code}"
    hint = ", which the system also sends when memory is full" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.path.getsize(path) - TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _last_error(text: str) -> str:
    """Return the last line of a log that names an exception."""
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*[\w.]*(Error|Exception|Interrupt)\b", line)]
    return lines[-1] if lines else ""
