"""Trains the runs of a queue one after the other, each in processes of its own, while the program that shows them goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..config.request import TrainRequest
from ..devices import pick_device
from ..errors import Cancelled, UserError, one_line
from ..host import Host, Notice, Paths
from ..runs.lock import Locked, RunLock
from .job import EVENTS, STOP, STOPPED, Result
from .launch import Relay, devices_to_start, outcome
from .portable_job import pack, unpack
from .run_queue import (
    FAILED,
    TRAINING,
    WAITING,
    Entry,
    RunQueue,
    new_job_folder,
    remove_job_folder,
    unfinished,
)
from .torchrun import Processes

POLL_SECONDS, FAULT_SECONDS = 0.2, 10.0


class BackgroundHost(Host, Protocol):
    """The host of a run that is trained in the background."""

    def close(self, error: BaseException | None) -> None:
        """Report the end of the run; the error that ended it, None if it finished."""
        ...


@dataclass
class Current:
    """The run that is trained.

    Args:
        entry: the run in the queue.
        host: gets its events.
        processes: train it.
        relay: reads their events.
    """

    entry: Entry
    host: BackgroundHost
    processes: Processes
    relay: Relay


class BackgroundRuns:
    """Starts the first run of the queue when none is trained, and passes its events on. Call turn() again and again.

    Of several programs with one output folder, one is in charge of its queue: the one that holds the queue's lock.

    Args:
        queue: the queue.
        host_of: returns the host of a run.
    """

    def __init__(self, queue: RunQueue, host_of: Callable[[Entry], BackgroundHost]):
        self.queue, self._host_of = queue, host_of
        self._current: Current | None = None
        self._lock = ExitStack()
        self._is_in_charge = self._has_thread = False

    def add(self, request: TrainRequest, prompt: Mapping[str, Any], node: str, paths: Paths) -> tuple[Entry, int]:
        """Add a run to the queue, unless the same one is there. Return its entry, and how many runs are before it.

        Raises:
            UserError: the queue can't be written.
        """
        training = request.training
        try:
            entry = self.queue.add(training.name, node, pack(request, prompt, paths), training.detached)
        except OSError as error:
            text = (
                f"the queue in {self.queue.folder} can't be written: {error.strerror}; free disk space or fix the path"
            )
            raise UserError.at("background", text) from error
        ids = [other.id for other in self.queue.entries() if other.state != FAILED]
        return entry, ids.index(entry.id) if entry.id in ids else 0

    def start_thread(self) -> None:
        """Call turn() in a thread of its own as long as this process lives. Once is enough."""
        if self._has_thread:
            return
        self._has_thread = True

        def work() -> None:
            while True:
                try:
                    self.turn()
                    time.sleep(POLL_SECONDS)
                except Exception:  # such as a folder that can't be read at this moment
                    logging.exception("[ChromaTrainer] a fault in the queue of runs in the background")
                    time.sleep(FAULT_SECONDS)

        threading.Thread(target=work, daemon=True, name="background-runs").start()

    def turn(self) -> None:
        """Do what is to be done at this moment."""
        if not self._take_charge():
            return
        if self._current is None:
            self._current = self._next()
        if self._current is not None:
            self._follow(self._current)

    def close(self) -> None:
        """Let another program have the queue. A run that is not detached ends after its step."""
        if self._current:
            self._current.processes.stop_after_step()
        self._lock.close()
        self._is_in_charge = False

    def _take_charge(self) -> bool:
        if not self._is_in_charge and self.queue.folder.is_dir():  # nothing is created before the first run
            try:
                self._lock.enter_context(RunLock(self.queue.folder))
                self._is_in_charge = True
            except (Locked, OSError):  # of another program; on a read-only disk, nothing can be trained either
                return False
        return self._is_in_charge

    def _next(self) -> Current | None:
        entries = [entry for entry in self.queue.entries() if entry.state != FAILED]
        if not entries:
            return None
        entry = entries[0]
        return self._take_over(entry) if entry.state == TRAINING else self._start(entry)

    def _take_over(self, entry: Entry) -> Current:
        """Follow a run that another process has started, and that may have ended."""
        folder, host = entry.job_path, self._host_of(entry)
        relay = Relay(folder / EVENTS, host, from_now=True)
        return Current(entry, host, Processes(folder, None), relay)

    def _start(self, entry: Entry) -> Current | None:
        host = self._host_of(entry)
        folder = new_job_folder()
        try:
            job = unpack(entry.job, host.paths, entry.is_detached)
            devices = devices_to_start(job.request, host) or [str(pick_device(host.device))]
            host.free_memory()
            job.write(folder)
            entry = self.queue.update(entry, state=TRAINING, job_folder=folder.name, run="", message="")
            processes = Processes.start(folder, devices, is_detached=entry.is_detached)
        except Exception as error:
            remove_job_folder(folder)
            self._fail(entry, host, error)
            return None
        host.emit(Notice(f"{entry.name}: training in the background, on {', '.join(devices)}"))
        return Current(entry, host, processes, Relay(folder / EVENTS, host))

    def _follow(self, current: Current) -> None:
        is_running = current.processes.are_running  # asked before the last events are read
        current.relay.pass_on()
        folder = current.relay.run_folder
        if folder and current.entry.run != folder.name:
            current.entry = self.queue.update(current.entry, run=folder.name)
        if not is_running:
            self._current = None
            self._finish(current)

    def _finish(self, current: Current) -> None:
        entry, folder = current.entry, current.processes.folder
        result = Result.read(folder)
        if current.processes.process is None and _is_interrupted(entry, folder, result):
            self.queue.update(entry, state=WAITING, job_folder="", run="")  # it resumes from its checkpoint
        else:
            self._close(current, result)
        remove_job_folder(folder)

    def _close(self, current: Current, result: Result | None) -> None:
        current.processes.wait()
        try:
            outcome(result, current.processes, current.relay)
        except (UserError, Cancelled) as error:
            if isinstance(error, UserError) and not current.relay.run_folder:
                self._fail(current.entry, current.host, error)
                return
            unfinished[current.entry.name] += 1
            current.host.close(error)
        else:
            current.host.close(None)
        self.queue.drop(current.entry)

    def _fail(self, entry: Entry, host: BackgroundHost, error: Exception) -> None:
        """Keep a run that has no folder in the queue, with the reason, until the user removes it."""
        message = one_line(error)
        host.emit(Notice(f"{entry.name} in the background failed: {message}", "warning"))
        host.close(error)
        unfinished[entry.name] += 1
        self.queue.update(entry, state=FAILED, message=message, job_folder="")


def _is_interrupted(entry: Entry, folder: Path, result: Result | None) -> bool:
    """Return whether a run ended because the program that started it did, or the machine, and not the user's command."""
    return result is None or (result.status == STOPPED and not entry.is_detached and not (folder / STOP).exists())
