"""Only one process works in a run folder. The system gives the lock back when its process ends, however it ends."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from types import TracebackType

FILE = "run.lock"
TRIES, WAIT_SECONDS = 10, 0.03  # somebody who only asks holds the lock for an instant
HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK})


class Locked(Exception):
    """Another process holds the folder."""


class RunLock:
    """Holds folder/run.lock, from `with` to its end.

    The file is empty and stays: what counts is the system's lock on it (flock; msvcrt on Windows), which a killed
    process can't leave behind. On a share that knows no locks there is none, and nothing is refused.

    Raises:
        Locked: at `with`, when another process, or another thread of this one, has it.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder) / FILE
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for last in [False] * (TRIES - 1) + [True]:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            if _lock(handle):
                self._handle = handle
                return self
            os.close(handle)
            if last:
                raise Locked(str(self.path.parent))
            time.sleep(WAIT_SECONDS)
        raise AssertionError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)  # closing unlocks
            self._handle = None


def is_held(folder: Path) -> bool:
    """Whether a live process works in the folder at this moment."""
    try:
        handle = os.open(Path(folder) / FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """False when another one has it. True also where the file system knows no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in HELD
    return True
