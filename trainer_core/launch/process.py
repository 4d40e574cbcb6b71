"""One of the processes that launch.py starts: how it reports, and when it ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import Cancelled, UserError
from ..host import Event, MemoryInUse
from ..runs.run_host import Paused
from .job import EVENTS, FAILED, PAUSED, REFUSED, STOPPED, Result, encode_event

MEMORY_SECONDS = 1.0  # minimum time between two measurements


class EventFile:
    """A sink that writes every event as a line, for launch.Relay, and how much memory this process uses.

    Args:
        folder: of the job.
        memory_use: returns the memory in use.
    """

    def __init__(self, folder: Path, memory_use: Callable[[], MemoryInUse]):
        self._file, self._memory_use, self._memory_due = (folder / EVENTS).open("ab", buffering=0), memory_use, 0.0

    def __call__(self, event: Event) -> None:
        if time.monotonic() >= self._memory_due:
            self._memory_due = time.monotonic() + MEMORY_SECONDS
            self._write(self._memory_use())
        self._write(event)

    def _write(self, event: Event) -> None:
        self._file.write(encode_event(event).encode("utf-8") + b"\n")


def on_end_of_input(call: Callable[[], Any]) -> None:
    """Call a function when standard input is closed: whoever started this process has ended, or wants it to end."""

    def wait() -> None:
        try:
            while os.read(0, 1):
                pass
        except OSError:
            pass
        call()

    threading.Thread(target=wait, daemon=True, name="end-of-input").start()


@contextmanager
def reporting(folder: Path, is_first: bool) -> Iterator[None]:
    """Write how the run ended to result.json. Only what nobody foresaw is raised further.

    Args:
        is_first: whether this is the first process of its machine. The others are silent.
    """
    try:
        yield
        return
    except Paused as pause:
        result = Result(PAUSED, text=str(pause.folder))
    except Cancelled:
        result = Result(STOPPED)
    except UserError as error:
        result = Result(REFUSED, problems=error.problems)
    except BaseException as error:
        if is_first:
            Result(FAILED, text=f"{type(error).__name__}: {error}").write(folder)
        raise
    if is_first:
        result.write(folder)
    if result.status == REFUSED:
        raise SystemExit(2)  # torchrun ends the others
