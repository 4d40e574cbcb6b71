"""A thread for each tracker: the loop puts calls into a queue and never waits for one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from ..errors import reason_of
from .tracker import Opening, Tracker

LONGEST_QUEUE = 100_000  # calls; one that can't keep up by so many is given up

Call = Callable[[Tracker], None]


class TrackerThread:
    """Calls one tracker, in order. Whatever it raises ends the lane, is told once, and never reaches the run.

    Args:
        name: of the tracker.
        make: the tracker itself, from an Opening and a way to tell the user something.
        told: gets (text, level) for the user, from this lane's thread or the caller's.
    """

    def __init__(
        self, name: str, make: Callable[[Opening, Callable[[str], None]], Tracker], told: Callable[[str, str], None]
    ):
        self.name, self._make, self._told = name, make, told
        self._calls: queue.Queue[Call | None] = queue.Queue(LONGEST_QUEUE)
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def begin(self, opening: Opening) -> None:
        self._thread = threading.Thread(target=self._work, args=(opening,), name=f"tracker {self.name}", daemon=True)
        self._thread.start()

    def put(self, call: Call | None) -> None:
        if self._over.is_set():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up(f"it is {LONGEST_QUEUE} reports behind")

    def close(self, failed: bool, seconds: float) -> None:
        """Let it finish what was put, for so long at most."""
        if self._thread is None:
            return
        self.put(lambda tracker: tracker.close(failed))
        self.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._give_up(f"it has not finished in {seconds:.0f} s")

    def _work(self, opening: Opening) -> None:
        try:
            tracker = self._make(opening, lambda text: self._told(text, "info"))
            while (call := self._calls.get()) is not None and not self._over.is_set():
                call(tracker)
        except (Exception, SystemExit) as error:  # a run is worth more than its curves elsewhere
            self._give_up(reason_of(error) if isinstance(error, Exception) else "it ended itself")

    def _give_up(self, reason: str) -> None:
        if not self._over.is_set():
            self._over.set()
            self._told(f"{self.name}: {reason}; the run goes on without it", "warning")
