"""Lock a run folder for one process. The operating system releases the lock when the process ends, however it ends."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from types import TracebackType

FILE = "run.lock"
TRIES, WAIT_SECONDS = 10, 0.03  # is_held takes the lock for an instant
HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK})


class Locked(Exception):
    """Another process holds the lock of the folder."""


class RunLock:
    """Context manager that holds the lock on folder/run.lock.

    The file is empty and is never deleted. The lock is the operating system's (flock; msvcrt on Windows), which a
    killed process can't leave behind. On a network share without locks nothing is locked, and no process is refused.

    Raises:
        Locked: on entry, when another process, or another thread of this one, holds the lock.
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
    """Return whether a running process holds the folder's lock at this moment."""
    try:
        handle = os.open(Path(folder) / FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Take the lock. Return False when another process holds it; True also where the file system has no locks."""
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
