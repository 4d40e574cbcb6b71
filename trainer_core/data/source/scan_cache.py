"""A database that caches the scans of images between runs, by the image's name and stamp."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ...storage.atomic import sha256_text

# Earlier versions had the table `scans`, without profiles: images are scanned once more.
TABLE = (
    "CREATE TABLE IF NOT EXISTS scans_2 "
    "(name TEXT PRIMARY KEY, stamp TEXT, sha256 TEXT, width INTEGER, height INTEGER, profile TEXT)"
)
WAIT_SECONDS = 10.0  # for another process that writes
MAX_NAMES = 500  # in one query; every SQLite allows at least 999

Known = tuple[str, str, int, int, str]  # stamp, sha256, width, height, profile


class ScanMemory:
    """A cache of scans. If it can't be read or written, it is recreated or not used, which only costs time.

    Args:
        folder: Folder of the databases, one for each root.
        root: The dataset's folder.
    """

    def __init__(self, folder: Path, root: str):
        self.path = folder / f"{sha256_text(root)[:16]}.sqlite"
        self._connection = self._open() or self._open(recreate=True)

    def _open(self, recreate: bool = False) -> sqlite3.Connection | None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if recreate:
                self.path.unlink(missing_ok=True)
            connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
            connection.execute(TABLE)
            return connection
        except (OSError, sqlite3.Error):
            return None

    def read(self, names: Sequence[str]) -> dict[str, Known]:
        """Return the cached scans of these names."""
        results: dict[str, Known] = {}
        for start in range(0, len(names) if self._connection else 0, MAX_NAMES):
            part = names[start : start + MAX_NAMES]
            marks = ",".join("?" * len(part))
            results |= {row[0]: row[1:] for row in self._query(f"SELECT * FROM scans_2 WHERE name IN ({marks})", part)}
        return results

    def learn(self, scans: Mapping[str, Known]) -> None:
        """Store these scans, all or none."""
        if not scans or not self._connection:
            return
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            rows = [(name, *known) for name, known in scans.items()]
            self._connection.executemany("INSERT OR REPLACE INTO scans_2 VALUES (?, ?, ?, ?, ?, ?)", rows)
            self._connection.execute("COMMIT")
        except (sqlite3.Error, UnicodeError):  # a name that is not valid Unicode is scanned again each time
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def close(self) -> None:
        if self._connection:
            self._connection.close()

    def _query(self, statement: str, values: Iterable[str]) -> list[tuple]:
        assert self._connection
        try:
            return self._connection.execute(statement, list(values)).fetchall()
        except (sqlite3.Error, UnicodeError):
            return []
