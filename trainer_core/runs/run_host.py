"""The host of one run: it locks the run's folder, logs its events, and lets the user pause and stop it."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..distributed.ranks import RankLost
from ..errors import Cancelled, UserError, one_line
from ..host import Event, Host, Machines, Notice, Paths
from ..storage.atomic import remove_temporaries
from ..trackers.dispatch import TrackerSink
from .control import read_status, take_command, write_status
from .event_log import RESUMED, WAIT_SECONDS, EventLog
from .lock import Locked, RunLock


class Stopped(Cancelled):
    """The user stopped the run through a command in its folder."""


class Paused(Cancelled):
    """The user paused the run through a command in its folder. It can be resumed."""

    def __init__(self, folder: Path):
        super().__init__(str(folder))
        self.folder = folder


@dataclasses.dataclass(frozen=True)
class ForwardingHost:
    """An environment inside of another host, to which it passes everything on, except for the events."""

    host: Host

    @property
    def paths(self) -> Paths:
        return self.host.paths

    @property
    def device(self) -> str:
        return self.host.device

    @property
    def prompt(self) -> Mapping[str, Any]:
        return self.host.prompt

    @property
    def node_id(self) -> str:
        return self.host.node_id

    @property
    def waits_when_paused(self) -> bool:
        return self.host.waits_when_paused

    @property
    def machines(self) -> Machines:
        return self.host.machines

    @property
    def background(self) -> Callable[[Any, Mapping[str, Any]], None] | None:
        return self.host.background

    @property
    def faults(self) -> Sequence[str]:
        return self.host.faults

    def check_cancelled(self) -> None:
        self.host.check_cancelled()

    def free_memory(self) -> None:
        self.host.free_memory()


@dataclasses.dataclass(frozen=True)
class RunHost(ForwardingHost):
    """The host of a run with a folder.

    Events also go to the event log and to the trackers. Commands in the folder are obeyed between two steps.
    """

    event_log: EventLog
    trackers: TrackerSink | None = None

    def emit(self, event: Event) -> None:
        before = self.event_log.fault
        self.event_log(event)
        if self.event_log.fault != before:
            self.host.emit(
                Notice(f"events.jsonl can't be written: {self.event_log.fault}; the run continues", "warning")
            )
        earlier = len(self.host.faults)
        self.host.emit(event)
        for fault in self.host.faults[earlier:]:
            self.event_log(Notice(f"output can't be written ({fault}); the run continues without it", "warning"))
        if self.trackers:
            self.trackers(event)
            self.emit_tracker_notices()

    def begin(self, step: int, num_steps: int, losses: Sequence[float]) -> None:
        """Record that training starts.

        Args:
            step: step that the run is resumed from, 0 for none.
            losses: losses of the steps before.
        """
        self.event_log.write({"kind": RESUMED, "step": step})
        self.event_log.set(step=step, total=num_steps)
        if self.trackers:
            self.trackers.begin(step, num_steps, losses)

    def emit_tracker_notices(self) -> None:
        """Emit the notices of the trackers in this thread, because sinks must not be called from another one."""
        for notice in self.trackers.take_notices() if self.trackers else ():
            self.event_log(notice)
            self.host.emit(notice)

    def check_cancelled(self) -> None:
        try:
            self.host.check_cancelled()
        except BaseException:
            self.event_log.ended_by_user = True
            raise
        command = take_command(self.event_log.folder)
        if command == "stop":
            raise Stopped
        if command == "pause":
            raise Paused(self.event_log.folder)


@contextmanager
def open_run(folder: Path, host: Host) -> Iterator[RunHost]:
    """Lock a run folder, open its event log, and keep its status up to date until the context exits.

    Raises:
        UserError: another process uses the folder.
    """
    with _lock_folder(folder):
        remove_temporaries(folder)
        take_command(folder)  # discard a command from after the last run's end
        event_log = EventLog(folder)
        event_log.set()
        try:
            yield RunHost(host, event_log)
            event_log.set(state="finished", pid=0)
        except Paused:
            event_log.set(state="paused", pid=os.getpid() if host.waits_when_paused else 0)
            raise
        except BaseException as error:
            failed = isinstance(error, Exception) and not isinstance(error, Cancelled) and not event_log.ended_by_user
            failed = failed or isinstance(error, RankLost)  # torchrun then sends SIGTERM, as a user may
            event_log.set(state="failed" if failed else "stopped", pid=0, message=one_line(error) if failed else "")
            raise
        finally:
            event_log.close()


def wait_for_resume(folder: Path, host: Host) -> None:
    """Wait until the paused run is resumed. Nothing is held in memory meanwhile.

    Raises:
        Stopped: the user stopped the run through its folder.
        Cancelled (or the host's own interrupt): the user canceled the run.
    """
    host.emit(Notice(f"paused; memory is free. To resume: chroma-trainer resume {folder}", "warning"))
    with _lock_folder(folder):
        status = read_status(folder)
        assert status
        if not status.pid:  # the processes that trained have ended, and this one waits
            write_status(folder, dataclasses.replace(status, pid=os.getpid()))
        try:
            while (command := take_command(folder)) != "resume":
                host.check_cancelled()
                if command == "stop":
                    raise Stopped
                time.sleep(WAIT_SECONDS)
        except BaseException:
            write_status(folder, dataclasses.replace(status, state="stopped", pid=0))
            raise


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(RunLock(folder))
        except Locked:
            status = read_status(folder)
            who = f"process {status.pid} ({status.text()})" if status else "another process"
            raise UserError.at(
                str(folder),
                f"{who} is using this run folder; wait for it, or stop it: chroma-trainer stop {Path(folder).name}",
            ) from None
        yield
