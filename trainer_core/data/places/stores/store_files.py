"""Download the files of a store through the cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..byte_cache import ByteCache
from .retry import with_retries
from .store import Changed, Missing, Store, StoredFile, Temporary

LARGEST_FILE = 256 << 20  # bytes of an image or a caption
TRIES_OF_CHANGED = 3


class StoreFiles:
    """The files of a store.

    Args:
        store: The store.
        cache: Where they are stored.
        check_cancelled: Raises if the user canceled.
    """

    def __init__(self, store: Store, cache: ByteCache, check_cancelled: Callable[[], None]):
        self.store, self.cache, self._check_cancelled = store, cache, check_cancelled

    def list(self) -> list[StoredFile]:
        """Return every file, sorted by name.

        Raises:
            UserError: The store can't be listed.
        """
        files, token = list[StoredFile](), ""
        while True:
            page = partial(self.store.page, token)  # tried again by itself: a million files are a thousand pages
            more, token = with_retries(self.store.place, page, self._check_cancelled)
            files += more
            if not token:
                return sorted(files, key=lambda file: file.name)

    def read(self, file: StoredFile) -> bytes:
        """Return the bytes of a file.

        Raises:
            Missing: It can't be had, or is too large for an image.
            UserError: The store does not answer any more.
        """
        if file.size > LARGEST_FILE:
            raise Missing(f"it has {file.size >> 20} MiB; at most {LARGEST_FILE >> 20} are read")
        raw = self.cache.read(self._path(file))
        if raw is not None and len(raw) == file.size:
            return raw
        return self.fetch(file).read_bytes()

    def fetch(self, file: StoredFile) -> Path:
        """Download a file, unless it is in the cache. An interrupted download is continued.

        Returns:
            Its path in the cache.
        Raises:
            Missing, UserError: As for read.
        """
        path = self._path(file)
        if self.cache.find(path, file.size):
            return path
        with self.cache.lock(path):  # other threads and processes read the same file
            if not self.cache.find(path, file.size):
                self.cache.make_room(file.size)
                self._download(file, path)
        return path

    def _download(self, file: StoredFile, path: Path) -> None:
        place = f"{self.store.place}/{file.name}"
        for _ in range(TRIES_OF_CHANGED):
            try:
                with_retries(place, lambda: self._continue(file, path), self._check_cancelled)
                return self.cache.finish(path)
            except (Changed, Missing) as error:
                with suppress(OSError):
                    self.cache.part(path).unlink(missing_ok=True)
                if isinstance(error, Missing):
                    raise
        raise Missing("it was replaced while it was downloaded")

    def _continue(self, file: StoredFile, path: Path) -> None:
        with self.cache.open_part(path) as target:
            start = target.tell()
            if start < file.size or not start:
                self._check_cancelled()
                self.store.download(file, target, start)
            target.flush()
            os.fsync(target.fileno())
            size = target.tell()
        if size < file.size:
            raise Temporary(f"{size} of {file.size} bytes came")
        if size > file.size:
            raise Changed

    def _path(self, file: StoredFile) -> Path:
        return self.cache.path(self.store.place, file.name, file.stamp)
