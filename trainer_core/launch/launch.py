"""Train a request in several processes, as seen from the process that starts them: the command line, or ComfyUI."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.request import TrainRequest
from ..devices import pick_device
from ..distributed.device_list import accelerators, devices_for, is_worker, num_launched
from ..errors import Cancelled, Problem, UserError
from ..host import Event, Host, Notice, RunOpened
from ..runs.control import read_status, write_status
from ..runs.layout import RANKS, rank_log
from ..runs.run_host import Paused, Stopped
from .job import EVENTS, FAILED, FINISHED, PAUSED, REFUSED, STOPPED, Job, Result, decode_event
from .torchrun import Processes

POLL_SECONDS = 0.1


def devices_to_start(request: TrainRequest, host: Host) -> list[str]:
    """Return the devices that each need a process of their own; [] where this process trains by itself.

    Raises:
        UserError: see devices_for.
    """
    if num_launched() or is_worker():
        return []
    devices = devices_for(request.training, host.machines.count)
    if host.machines.count > 1:
        return [name for name in devices if name] or accelerators()[:1] or ["cpu"]
    return [name or str(pick_device(host.device)) for name in devices]


def launch(request: TrainRequest, host: Host, prompt: Mapping[str, Any], devices: Sequence[str]) -> Result:
    """Train on these devices, each in a process of its own, and pass their events on.

    Raises:
        UserError: what a process raised, or a process ended without a message.
        Paused, Stopped: the user paused or stopped the run through its folder.
        Cancelled (or the host's own interrupt): a checkpoint and a usable LoRA of the completed steps are on disk.
    """
    host.free_memory()  # of this process, on the devices that the others use
    host.emit(Notice(_describe(devices, host)))
    with tempfile.TemporaryDirectory(prefix="chroma-trainer-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        Job(request, host.paths, dict(prompt)).write(folder)
        processes = Processes.start(folder, devices, host.machines)
        relay = Relay(folder / EVENTS, host)
        try:
            while processes.are_running:
                relay.pass_on()
                host.check_cancelled()
                time.sleep(POLL_SECONDS)
        except BaseException:
            _end(processes, relay)
            raise
        finally:
            processes.wait()
            relay.pass_on()
        return outcome(Result.read(folder), processes, relay)


def _describe(devices: Sequence[str], host: Host) -> str:
    """Return where a run is trained, in words."""
    if host.machines.count > 1:
        where = f" on machine {host.machines.number} of {host.machines.count}"
        return f"training with {len(devices)} processes{where}: {', '.join(devices)}"
    if len(devices) == 1:
        return f"training in a process of its own: {devices[0]}"
    return f"training with {len(devices)} processes: {', '.join(devices)}"


class Relay:
    """Passes the events of a file on to a host, as they come.

    Args:
        path: the file.
        host: gets the events.
        from_now: whether to leave out the events that are there already.
    """

    def __init__(self, path: Path, host: Host, from_now: bool = False):
        self._path, self._host, self._offset = path, host, 0
        self.run_folder: Path | None = None
        if from_now:
            for event in self._new_events():
                self._note(event)

    def pass_on(self) -> None:
        """Emit the events that have come since the last call."""
        for event in self._new_events():
            self._note(event)
            self._host.emit(event)

    def _note(self, event: Event) -> None:
        if isinstance(event, RunOpened):
            self.run_folder = event.folder

    def _new_events(self) -> list[Event]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                lines = file.read()
        except OSError:  # none has come yet
            return []
        complete = lines[: lines.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [decode_event(line.decode("utf-8")) for line in complete.splitlines()]


def _end(processes: Processes, relay: Relay) -> None:
    """End the processes after the current step, or at once if the user interrupts this too."""
    processes.stop_after_step()
    try:
        while processes.are_running:
            relay.pass_on()
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        processes.stop_now()


def _record_failure(run_folder: Path, text: str) -> None:
    """Write to the run's folder why it failed, where its process was ended before it could."""
    status = read_status(run_folder)
    if status and status.state == "died":
        write_status(run_folder, replace(status, state="failed", message=text))


def outcome(result: Result | None, processes: Processes, relay: Relay) -> Result:
    """Return the result of a finished run, or raise what its processes raised.

    Raises:
        UserError: what a process raised, or a process ended without a message.
        Paused, Stopped, Cancelled: the user ended the run.
    """
    if result is None or result.status == FAILED:
        reason = processes.describe_failure() if result is None else f"{result.text}; {processes.describe_failure()}"
        logs = f"; logs: {relay.run_folder / RANKS}" if relay.run_folder else ""
        text = f"a process of this run failed: {reason}{logs}. Run again to resume from the last checkpoint"
        if relay.run_folder:
            processes.save_log(rank_log(relay.run_folder, 0))
            _record_failure(relay.run_folder, text)
        raise UserError.at("devices", text)
    if result.status == FINISHED:
        return result
    if result.status == REFUSED:
        killed = processes.killed() if any(problem.field == "devices" for problem in result.problems) else []
        raise UserError([*result.problems, *(Problem("devices", text) for text in killed)])
    if result.status == PAUSED:
        raise Paused(Path(result.text))
    raise Stopped if result.status == STOPPED else Cancelled
