"""A thread for each tracker: the training loop puts calls into a queue and never waits for a tracker."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from ..errors import reason_of
from .tracker import Opening, Tracker

LONGEST_QUEUE = 100_000  # calls; a tracker that is this far behind is disabled

Call = Callable[[Tracker], None]


class TrackerThread:
    """Calls one tracker, in order. An exception disables the tracker, is reported once, and never reaches the run.

    Args:
        name: Name of the tracker.
        make: Creates the tracker from an Opening and a function that shows a line of text to the user.
        report: Called with (text, level) for the user, from this thread or the caller's.
    """

    def __init__(
        self, name: str, make: Callable[[Opening, Callable[[str], None]], Tracker], report: Callable[[str, str], None]
    ):
        self.name, self._make, self._report = name, make, report
        self.takes_events = hasattr(make, "event")  # see Tracker
        self._calls: queue.Queue[Call | None] = queue.Queue(LONGEST_QUEUE)
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def begin(self, opening: Opening) -> None:
        self._thread = threading.Thread(
            target=self._run_calls, args=(opening,), name=f"tracker {self.name}", daemon=True
        )
        self._thread.start()

    def put(self, call: Call | None) -> None:
        if self._over.is_set():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._disable(f"it is {LONGEST_QUEUE} calls behind")

    def close(self, failed: bool, seconds: float, is_patient: bool = True) -> None:
        """Let the tracker finish its queued calls, for at most so many seconds, or as long as it wishes if `is_patient`."""
        if self._thread is None:
            return
        if hasattr(self._make, "last_seconds") and is_patient:
            seconds = self._make.last_seconds(seconds)  # type: ignore[attr-defined]
        self.put(lambda tracker: tracker.close(failed))
        self.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._disable(f"it has not finished in {seconds:.0f} s")

    def _run_calls(self, opening: Opening) -> None:
        try:
            tracker = self._make(opening, lambda text: self._report(text, "info"))
            while (call := self._calls.get()) is not None and not self._over.is_set():
                call(tracker)
        except (Exception, SystemExit) as error:  # a tracker must never end the run
            self._disable(reason_of(error) if isinstance(error, Exception) else "it called sys.exit")

    def _disable(self, reason: str) -> None:
        if not self._over.is_set():
            self._over.set()
            self._report(f"{self.name}: {reason}; the run continues without it", "warning")
