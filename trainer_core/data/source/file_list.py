"""A million names of images and their stamps, in a file that the system maps."""

from __future__ import annotations

import mmap
import tempfile
from array import array
from collections.abc import Iterable

from ...storage.lazy_sequence import LazySequence
from .backend import Entry


class Entries(LazySequence[Entry]):
    """Reads like a list of them; an Entry is made when it is looked at. Eight bytes of memory for each.

    Args:
        found: (name, stamp) of each; neither holds a NUL.
    """

    def __init__(self, found: Iterable[tuple[str, str]]):
        self._ends = array("Q", [0])
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as this lives
        for name, stamp in found:
            text = f"{name}\0{stamp}".encode("utf-8", "surrogatepass")
            self._file.write(text)
            self._ends.append(self._ends[-1] + len(text))
        self._file.flush()
        self._text = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if len(self) else b""

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _item(self, place: int) -> Entry:
        text = self._text[self._ends[place] : self._ends[place + 1]]
        return Entry(*text.decode("utf-8", "surrogatepass").split("\0"))
