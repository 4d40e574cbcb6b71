"""Seconds by phase: every second of a run belongs to exactly one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("start", "text", "latents", "load", "train", "validate", "save")


class PhaseTimer:
    """A stopwatch with one hand: entering a phase pauses the one around it."""

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
        """The phase that is running, or was when the last one ended by a fault."""
        return self._failed or self._current

    def read(self) -> dict[str, float]:
        """Seconds so far, the running phase included, rounded to milliseconds."""
        self._switch(self._current)
        return {name: round(value, 3) for name, value in self.seconds.items()}
