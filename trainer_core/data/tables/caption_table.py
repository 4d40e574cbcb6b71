"""A table with one row for each image.

It is read once, in a stream. Its rows are kept in an unnamed, memory-mapped file, so that a million of them take about
20 MB of memory.
"""

from __future__ import annotations

import mmap
import re
import tempfile
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...config.dataset import FolderConfig
from ...errors import UserError
from ...storage.digest_table import DigestTable, digests, first_of_each
from ..source.backend import Entry, printable_name, same_name, stem
from .caption_row import KOHYA, BadRow, Columns, Row, unpack_row
from .table_files import BadTable, Values, table_rows

NUM_SHOWN = 5  # faults in an error message
BLOCK = 4096  # rows that are written at once
ABSOLUTE = re.compile(r"/|[A-Za-z]:/|\w+://")


class CaptionTable:
    """The rows of a table, by the number of their image.

    Args:
        path: The table.
        settings: Of its folder.
        root: The folder, from which the table's names are relative.
        entries: The images of the folder.
    Raises:
        UserError: The table can't be read, or rows are damaged or name the same file.
    """

    def __init__(self, path: Path, settings: FolderConfig, root: Path, entries: Sequence[Entry]):
        self.name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        self._ends, self._text, names, lines = _read(path, self.name, settings)
        names = _without_shared_folder(names)
        keys = digests(names)
        self._table = DigestTable(keys, np.arange(len(names), dtype=np.int32))
        if self._table.has_duplicates():
            raise _duplicate(self.name, names, lines, first_of_each(keys), keys)
        prefix = path.parent.relative_to(root).as_posix() + "/" if path.is_relative_to(root) else "./"
        composed = None
        if not all(map(str.isascii, names)):
            composed = DigestTable(digests(map(same_name, names)), np.arange(len(names), dtype=np.int32))
        self._rows = self._match(entries, "" if prefix == "./" else prefix, composed)
        used, counts = np.unique(self._rows[self._rows >= 0], return_counts=True)
        self._shared = used[counts > 1]  # rows of several images
        is_used = np.zeros(len(names), dtype=bool)
        is_used[used] = True
        unused = np.flatnonzero(~is_used)
        self.num_unused = len(unused)
        self.unused = printable_name(names[int(unused[0])]) if len(unused) else ""
        self.first_name = printable_name(names[0]) if names else ""

    def _match(self, entries: Sequence[Entry], prefix: str, composed: DigestTable | None) -> np.ndarray:
        """Return the index of each image's row, or -1.

        A name is looked up from the folder of the table, from the folder of the images, and without folders; each time
        whole, then without its extension; at last in the composed form of Unicode, because macOS and archives from there
        have é as two characters. A row that an earlier way has matched is left to that image.

        Args:
            entries: The images.
            prefix: The folder of the table in that of the images, "" if both are the same.
            composed: The rows by names in the composed form; None if no row has other letters than those of ASCII.
        """
        rows = np.full(len(entries), -1, dtype=np.int64)
        is_free = np.ones(len(self._table), dtype=bool)
        folders: list[Callable[[str], str]] = [lambda name: name, lambda name: name.rpartition("/")[2]]
        if prefix:
            folders.insert(0, lambda name: name[len(prefix) :] if name.startswith(prefix) else "")
        ways = [part for folder in folders for part in (folder, lambda name, folder=folder: stem(folder(name)))]
        tables = [(self._table, lambda name: name)]
        if composed is not None:
            tables.append((composed, same_name))
        for table, form in tables:
            for way in ways:
                missing = np.flatnonzero(rows < 0)
                if not len(missing):
                    return rows
                images = entries if len(missing) == len(entries) else (entries[i] for i in missing.tolist())
                indices = table.find(digests(form(way(entry.name)) for entry in images))
                matches = np.where(indices >= 0, table.values[indices], -1)
                matches[(matches >= 0) & ~is_free[matches]] = -1
                rows[missing] = matches
                is_free[matches[matches >= 0]] = False
        return rows

    def row(self, number: int, name: str) -> Row | None:
        """Return the row of an image; None if it has none.

        Raises:
            BadRow: It is that of other images as well.
        """
        index = int(self._rows[number])
        if index < 0:
            return None
        if len(self._shared) and (self._shared == index).any():
            raise BadRow(
                f"its row in {self.name} is that of another image too; write names with folders and extensions"
            )
        begin = int(self._ends[index - 1]) if index else 0
        return unpack_row(str(self._text[begin : int(self._ends[index])], "utf-8", "surrogatepass"))


def _read(path: Path, shown: str, settings: FolderConfig) -> tuple[Any, Any, list[str], array]:
    """Return where the packed rows end, the packed rows, the names of their files, and the numbers of the rows."""
    ends, lines, names, end = array("Q"), array("Q"), list[str](), 0
    faults, num_faults, pieces = list[str](), 0, list[bytes]()
    columns: Columns | None = None
    with tempfile.TemporaryFile() as file:
        try:
            for number, values in table_rows(path):
                columns = columns or Columns(settings, values, True, KOHYA if _is_kohya(path, values) else "")
                try:
                    name = _name_of(values.get(columns.file))
                    row = columns.pack(values)
                except BadRow as fault:
                    num_faults += 1
                    faults += [f"row {number}: {fault}"] if len(faults) < NUM_SHOWN else []
                    continue
                names.append(name)
                lines.append(number)
                end += len(row)
                ends.append(end)
                pieces.append(row)
                if len(pieces) == BLOCK:
                    file.write(b"".join(pieces))
                    pieces.clear()
        except BadTable as error:
            raise UserError.at("table", f"{shown} {error}") from error
        if num_faults:
            more = f"; and {num_faults - NUM_SHOWN} more" if num_faults > NUM_SHOWN else ""
            raise UserError.at("table", f"{shown}, {'; '.join(faults)}{more}")
        if not names:
            raise UserError.at("table", f"{shown} has no rows; write one for each image")
        file.write(b"".join(pieces))
        file.flush()
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if end else b""
    return ends, text, names, lines


def _is_kohya(path: Path, values: Values) -> bool:
    return path.suffix.lower() == ".json" and not values.keys().isdisjoint(("caption", "tags"))


def _name_of(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    name = value.strip() if isinstance(value, str) else ""
    if not name:
        raise BadRow("it names no file")
    if "\\" in name:
        name = name.replace("\\", "/")
    return name[2:] if name.startswith("./") else name


def _without_shared_folder(names: list[str]) -> list[str]:
    """Return the names of files; absolute ones without the folder that all of those share.

    A table that was written on another machine, as kohya's meta_cap.json with full paths, is thus read as it is.
    """
    absolute = [name for name in names if ABSOLUTE.match(name)]
    if not absolute:
        return names
    first, last = min(absolute).split("/")[:-1], max(absolute).split("/")[:-1]
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    shared = "/".join(first[:length]) + "/"
    return [name.removeprefix(shared) if ABSOLUTE.match(name) else name for name in names]


def _duplicate(shown: str, names: list[str], lines: array, firsts: np.ndarray, keys: np.ndarray) -> UserError:
    """Return the error about two rows of one file."""
    second = int(np.setdiff1d(np.arange(len(names)), firsts)[0])
    first = int(np.flatnonzero((keys == keys[second]).all(axis=1))[0])
    text = (
        f"{shown} has {len(names) - len(firsts)} rows too many: rows {lines[first]} and {lines[second]} both name "
        f"{printable_name(names[second])!r}; remove one, or put several captions of an image into several columns"
    )
    return UserError.at("table", text)
