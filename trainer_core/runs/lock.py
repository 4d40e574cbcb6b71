"""Lock a run folder for one process. The operating system releases the lock when the process ends, however it ends."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

FILE = "run.lock"
WAIT_SECONDS, POLL_SECONDS = 0.3, 0.03  # is_held takes the lock for an instant


class Locked(Exception):
    """Another process holds the lock of the folder."""


class RunLock:
    """Context manager that holds the lock on folder/run.lock, with the package filelock.

    The lock is the operating system's (flock; msvcrt on Windows), which a killed process can't leave behind. On a
    network share without locks nothing is locked, and no process is refused.

    Raises:
        Locked: on entry, when another process, or another thread of this one, holds the lock.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder) / FILE
        self._lock: Any = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()  # raises where the folder is read-only; _take would ignore that
        self._lock = _take(self.path, WAIT_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def is_held(folder: Path) -> bool:
    """Return whether a running process holds the folder's lock at this moment."""
    path = Path(folder) / FILE
    if not path.is_file():
        return False
    try:
        _take(path, 0).release()
    except Locked:
        return True
    return False


def _take(path: Path, wait: float) -> Any:
    """Return the lock, which is not locked where the file system has no locks.

    Raises:
        Locked: after `wait` seconds.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=wait, poll_interval=POLL_SECONDS)
    except Timeout as error:
        raise Locked(str(path.parent)) from error
    except (OSError, NotImplementedError):
        pass
    return lock
