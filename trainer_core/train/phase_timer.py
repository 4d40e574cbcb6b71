"""Measure the seconds of each phase. Every second of a run belongs to exactly one phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("start", "text", "latents", "load", "eval", "train", "validate", "save")


class PhaseTimer:
    """A timer that runs for one phase at a time: entering a phase pauses the enclosing one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(NAMES, 0.0)
        self._current, self._since, self._failed = "start", time.perf_counter(), ""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = self._switch(name)
        try:
            yield
        except BaseException:
            self._failed = self._failed or name
            raise
        finally:
            self._switch(before)

    def _switch(self, name: str) -> str:
        now, before = time.perf_counter(), self._current
        self.seconds[before] += now - self._since
        self._current, self._since = name, now
        return before

    @property
    def current(self) -> str:
        """The running phase, or the phase in which an exception was raised first."""
        return self._failed or self._current

    def read(self) -> dict[str, float]:
        """Return the seconds so far by phase, with the running phase, rounded to milliseconds."""
        self._switch(self._current)
        return {name: round(value, 3) for name, value in self.seconds.items()}
