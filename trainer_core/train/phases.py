"""Seconds by phase: every second of a run belongs to exactly one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("start", "text", "latents", "load", "train", "validate", "save")


class Phases:
    """A stopwatch with one hand: entering a phase pauses the one around it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(NAMES, 0.0)
        self._current, self._since = "start", time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str) -> str:
        now, before = time.perf_counter(), self._current
        self.seconds[before] += now - self._since
        self._current, self._since = name, now
        return before

    def read(self) -> dict[str, float]:
        """Seconds so far, the running phase included, rounded to milliseconds."""
        self._switch(self._current)
        return {name: round(value, 3) for name, value in self.seconds.items()}
