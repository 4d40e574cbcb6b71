"""What reading an image once told, kept from run to run: a small database by the image's name and stamp."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ...storage.atomic import sha256_text

TABLE = (
    "CREATE TABLE IF NOT EXISTS scans (name TEXT PRIMARY KEY, stamp TEXT, sha256 TEXT, width INTEGER, height INTEGER)"
)
WAIT_SECONDS = 10.0  # for another process that writes
MAX_NAMES = 500  # in one question; SQLite takes 999 at least

Known = tuple[str, str, int, int]  # stamp, sha256, width, height


class ScanMemory:
    """A memory that can't be read or written is made anew, or done without: losing it costs time only.

    Args:
        folder: of the databases, one for each root.
        root: the dataset's folder.
    """

    def __init__(self, folder: Path, root: str):
        self.path = folder / f"{sha256_text(root)[:16]}.sqlite"
        self._connection = self._open() or self._open(anew=True)

    def _open(self, anew: bool = False) -> sqlite3.Connection | None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if anew:
                self.path.unlink(missing_ok=True)
            connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
            connection.execute(TABLE)
            return connection
        except (OSError, sqlite3.Error):
            return None

    def known(self, names: Sequence[str]) -> dict[str, Known]:
        """Those of the names that are known."""
        found: dict[str, Known] = {}
        for start in range(0, len(names) if self._connection else 0, MAX_NAMES):
            part = names[start : start + MAX_NAMES]
            marks = ",".join("?" * len(part))
            found |= {row[0]: row[1:] for row in self._ask(f"SELECT * FROM scans WHERE name IN ({marks})", part)}
        return found

    def learn(self, scans: Mapping[str, Known]) -> None:
        """Keep these, all or none."""
        if not scans or not self._connection:
            return
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            rows = [(name, *known) for name, known in scans.items()]
            self._connection.executemany("INSERT OR REPLACE INTO scans VALUES (?, ?, ?, ?, ?)", rows)
            self._connection.execute("COMMIT")
        except (sqlite3.Error, UnicodeError):  # a name that is no Unicode is scanned again each time
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def close(self) -> None:
        if self._connection:
            self._connection.close()

    def _ask(self, question: str, values: Iterable[str]) -> list[tuple]:
        assert self._connection
        try:
            return self._connection.execute(question, list(values)).fetchall()
        except (sqlite3.Error, UnicodeError):
            return []
