"""A dataset backend for images in archives: tar files (WebDataset), or parquet files with images."""

from __future__ import annotations

import threading
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ..source.backend import Entry, LeftOut, printable_name, stem
from ..source.file_list import Entries
from ..source.formats import is_readable, why_unreadable
from ..source.text_encoding import MAX_BYTES, UnreadableText, decode_regional, decode_unicode
from .byte_cache import ByteCache
from .image_rows import row_json
from .parquet_images import parquet_images, parquet_rows
from .stores.store import Missing
from .stores.store_files import LARGEST_FILE
from .tar_index import tar_members

TAR, PARQUET = ".tar", ".parquet"
GROUP_ROWS = 1  # rows for which a row group is read


@dataclass(frozen=True)
class Archive:
    """An archive.

    Attributes:
        name: Its name in the dataset.
        stamp: Changes when its bytes change.
        path: Returns where it lies on this machine, after a download if needed.
    """

    name: str
    stamp: str
    path: Callable[[], Path] = field(compare=False)


class TarBackend:
    """The images in tar archives. A caption is the .txt of the same name in the same archive.

    Args:
        place: Where the archives are, for messages.
        archives: The archives, sorted by name.
    """

    def __init__(self, place: str, archives: Sequence[Archive]):
        self.has_rows = False
        self.left_out = LeftOut()
        self.encodings: Counter[str] = Counter()
        self._place, self._archives = place, archives
        self._members: dict[str, tuple[int, int, int]] = {}  # name -> archive, offset, size

    def entries(self) -> Sequence[Entry]:
        self.left_out, self._members = LeftOut(), {}
        for number, archive in enumerate(self._archives):
            try:
                self._add(number, archive)
            except OSError as error:
                self.left_out.add_unreadable(self.path(archive.name), f"it can't be read ({error.strerror or error})")
        return Entries(
            (name, f"{self._archives[number].stamp}-{offset}-{size}")
            for name, (number, offset, size) in sorted(self._members.items())
            if is_readable(_suffix(name))
        )

    def _add(self, number: int, archive: Archive) -> None:
        for member in tar_members(archive.path()):
            name = f"{archive.name}/{member.name.removeprefix('./')}" if member.name else archive.name
            file, suffix = name.rpartition("/")[2], _suffix(name)
            if "__MACOSX" in name or (file.startswith(".") and member.name):
                continue
            name = name.replace("\0", "\ufffd")
            fault = member.fault or ("" if is_readable(suffix) else why_unreadable(suffix))
            if not fault and name in self._members:
                fault = "the archive has another member of this name, which is used"
            if fault and (not member.name or is_readable(suffix) or not member.fault):
                self.left_out.add_unreadable(self.path(name), fault)
            elif not fault:
                self._members[name] = (number, member.offset, member.size)

    def read(self, name: str) -> bytes:
        number, offset, size = self._members[name]
        if size > LARGEST_FILE:
            raise Missing(f"it has {size >> 20} MiB; at most {LARGEST_FILE >> 20} are read")
        with _open_archive(self._archives[number]) as stream:
            stream.seek(offset)
            return stream.read(size)

    def caption_text(self, name: str) -> tuple[str | None, str]:
        raw = self.file_beside(name, ".txt")
        if raw is None:
            return None, ""
        text = decode_unicode(raw)
        if text is None:
            text, encoding = decode_regional(raw, "")
            self.encodings[encoding] += 1
        return text, ""

    def file_beside(self, name: str, suffix: str) -> bytes | None:
        folder, _, file = name.rpartition("/")
        names = (stem(name) + suffix, f"{folder}/{file.partition('.')[0]}{suffix}")  # WebDataset ends keys at a dot
        other = next((other for other in names if other in self._members), None)
        if other is None:
            return None
        if self._members[other][2] > MAX_BYTES:
            raise UnreadableText(f"has {self._members[other][2] >> 20} MiB; at most {MAX_BYTES >> 20} are read")
        return self.read(other)

    def path(self, name: str) -> str:
        return printable_name(f"{self._place}/{name}")


def _open_archive(archive: Archive) -> IO[bytes]:
    """Open an archive; once more if another process deleted it from the cache in between."""
    try:
        return archive.path().open("rb")
    except FileNotFoundError:
        return archive.path().open("rb")


def _suffix(name: str) -> str:
    file = name.rpartition("/")[2]
    return f".{file.rpartition('.')[2].lower()}" if "." in file else ""


class ParquetBackend:
    """The images in the rows of parquet files, with captions from their other columns.

    Args:
        place: Where the files are, for messages.
        archives: The files, sorted by name.
        cache: Where the images are stored: rows can only be read in groups.
    """

    def __init__(self, place: str, archives: Sequence[Archive], cache: ByteCache):
        self.has_rows = True
        self.left_out = LeftOut()
        self.encodings: Counter[str] = Counter()
        self._place, self._archives, self._cache = place, archives, cache
        self._rows: dict[str, tuple[int, int]] = {}  # name -> archive, row
        self._texts = Texts()
        self._lock = threading.Lock()

    def entries(self) -> Sequence[Entry]:
        self.left_out, self._rows, self._texts = LeftOut(), {}, Texts()
        entries = []
        for number, archive in enumerate(self._archives):
            for row in parquet_rows(archive.path(), self.path(archive.name)):
                suffix = _suffix(row.path)
                name = f"{archive.name}/{row.number:06}{suffix if is_readable(suffix) else ''}"
                self._rows[name] = (number, row.number)
                self._texts.add(name, row_json(row.values))
                entries.append((name, f"{archive.stamp}-{row.number}"))
        return Entries(sorted(entries))

    def read(self, name: str) -> bytes:
        number, row = self._rows[name]
        raw = self._cache.read(self._image_path(number, row))
        if raw is None:
            with self._lock:  # else several threads read the same group
                raw = self._cache.read(self._image_path(number, row))
                raw = self._read_group(number, row) if raw is None else raw
        if not raw:
            raise Missing("its row has no image")
        return raw

    def _read_group(self, number: int, row: int) -> bytes:
        """Store every image of a row's group. Return that of the row."""
        archive, result = self._archives[number], b""
        for other, raw in parquet_images(archive.path(), self.path(archive.name), row, row + GROUP_ROWS):
            self._cache.write(self._image_path(number, other), raw)
            if other == row:
                result = raw
        return result

    def _image_path(self, number: int, row: int) -> Path:
        archive = self._archives[number]
        return self._cache.path(self._place, archive.name, archive.stamp, str(row))

    def caption_text(self, name: str) -> tuple[str | None, str]:
        return None, ""  # it is in the row

    def file_beside(self, name: str, suffix: str) -> bytes | None:
        return self._texts.get(name) if suffix == ".json" else None

    def path(self, name: str) -> str:
        return printable_name(f"{self._place}/{name}")


class Texts:
    """A text for each of many names, in one block of bytes."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._ends = array("Q", [0])
        self._bytes = bytearray()

    def add(self, name: str, raw: bytes) -> None:
        """Add a text."""
        self._numbers[name] = len(self._numbers)
        self._bytes += raw
        self._ends.append(len(self._bytes))

    def get(self, name: str) -> bytes:
        """Return the text of a name."""
        number = self._numbers[name]
        return bytes(self._bytes[self._ends[number] : self._ends[number + 1]])
