"""Files of stores on disk, up to a bound: the ones that were used longest ago are deleted first."""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO

from ...errors import UserError
from ...storage.atomic import remove_temporaries, rename, replace_atomic, sha256_text
from ...storage.bounded_files import format_size

VARIABLE = "CHROMA_TRAINER_URL_CACHE_GB"
USUAL_GB = 20.0
FOLDER, PART = "places", ".part"  # PART: ending of a download that is not complete
RECOUNT = 0.05  # share of the bound that is added before the files are counted again
ROOM = 0.9  # share of the bound that is left after files are deleted
STALE_SECONDS = 24 * 3600.0  # age of temporary files of killed processes


def cache_bytes() -> int:
    """Return the bound, in bytes.

    Raises:
        UserError: The environment variable is not a number.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        gigabytes = float(text) if text.strip() else USUAL_GB
    except ValueError:
        gigabytes = -1.0
    if not 0 < gigabytes < 1e6:
        raise UserError.at(VARIABLE, f"is {text[:40]!r}; set it to the size of the cache in GB, such as 20")
    return round(gigabytes * (1 << 30))


class ByteCache:
    """A cache of files by key. Several processes may share it.

    Args:
        folder: Where it is; created if it does not exist.
        max_bytes: Its bound.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        self._size = self._uncounted = 0  # of all files, and of those that were added since they were counted
        self._is_counted = False

    def path(self, *key: str) -> Path:
        """Return where the file with this key is, or would be."""
        digest = sha256_text(*key)
        return self.folder / digest[:2] / digest[2:34]

    def find(self, path: Path, size: int | None = None) -> bool:
        """Return whether a file is there, with this size if it is known, and mark it as used."""
        try:
            if size is not None and path.stat().st_size != size:
                return False
            os.utime(path)
            return True
        except OSError:
            return False

    def read(self, path: Path) -> bytes | None:
        """Return the bytes of a file; None if it is not there."""
        try:
            raw = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return raw

    def write(self, path: Path, raw: bytes) -> None:
        """Store the bytes of a file."""
        self.make_room(len(raw))
        replace_atomic(path, lambda temporary: temporary.write_bytes(raw))

    def lock(self, path: Path) -> AbstractContextManager[object]:
        """Return a lock that one thread of one process has at a time, for the download of a file."""
        from filelock import FileLock

        folder = self.folder.with_name(f"{self.folder.name}-locks")  # beside it, so that locks are never deleted
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / path.parent.name)

    def part(self, path: Path) -> Path:
        """Return the file into which the download of another one goes."""
        return path.with_name(path.name + PART)

    def finish(self, path: Path) -> None:
        """Give a complete download its name."""
        rename(self.part(path), path)

    def open_part(self, path: Path) -> IO[bytes]:
        """Open the download of a file for appending."""
        path.parent.mkdir(parents=True, exist_ok=True)
        return self.part(path).open("ab")

    def make_room(self, size: int) -> None:
        """Delete the files that were used longest ago until there is room for as many bytes, and count these.

        Raises:
            UserError: The cache is smaller than that.
        """
        if size > self.max_bytes:
            raise UserError.at(
                VARIABLE,
                f"the cache holds {format_size(self.max_bytes)}, and one file has {format_size(size)}; set {VARIABLE} "
                "to a larger size in GB",
            )
        with self._lock:
            if not self._is_counted:
                remove_temporaries(self.folder, STALE_SECONDS)
            if not self._is_counted or self._uncounted > RECOUNT * self.max_bytes:  # other processes add files too
                self._size, self._uncounted = sum(used for _, used, _ in self._files()), 0
                self._is_counted = True
            if self._size + size > self.max_bytes:
                self._size = self._shrink(round(self.max_bytes * ROOM) - size)
            self._size += size
            self._uncounted += size

    def _shrink(self, target: int) -> int:
        """Delete files until at most `target` bytes are left. Return how many there are."""
        files = sorted(self._files())
        size = sum(used for _, used, _ in files)
        for _, used, path in files:
            if size <= max(0, target):
                break
            with suppress(OSError):  # another process deleted it, or has it open
                os.unlink(path)
                size -= used
        return size

    def _files(self) -> list[tuple[int, int, str]]:
        """Return time of the last use, size and path of every file."""
        results = []
        for parent, _, names in os.walk(self.folder):
            for name in names:
                with suppress(OSError):
                    stat = os.stat(path := os.path.join(parent, name))
                    results.append((stat.st_mtime_ns, stat.st_size, path))
        return results
