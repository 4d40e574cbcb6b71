"""A dataset backend for a local folder and its subfolders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...storage.bounded_files import Unusable, read_regular
from .backend import Entry
from .file_list import Entries

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
MAX_CAPTION_BYTES = 1 << 20  # a caption has at most some thousand characters
ENCODINGS = ("utf-8-sig", "cp1252")  # editors on Windows still write cp1252


class FolderBackend:
    """The images below a folder. A caption is the .txt file of the same name."""

    def __init__(self, root: Path):
        self.root = str(root)  # strings: creating a Path for each of 10,000 names takes 0.25 s

    def entries(self) -> Sequence[Entry]:
        return Entries(_images(self.root, ""))

    def read(self, name: str) -> bytes:
        with open(self.path(name), "rb") as file:
            return file.read()

    def caption_text(self, name: str) -> tuple[str | None, str]:
        path = os.path.splitext(self.path(name))[0] + ".txt"
        try:
            return decode_text(read_regular(path, MAX_CAPTION_BYTES)), _stamp(os.stat(path))
        except FileNotFoundError:
            return None, ""
        except (OSError, Unusable) as error:
            if os.path.isdir(path):
                return None, ""
            raise error if isinstance(error, OSError) else OSError(f"it {error}") from error

    def path(self, name: str) -> str:
        return os.path.join(self.root, *name.split("/"))


def _images(folder: Path | str, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the name and stamp of every image below a folder, sorted by name, without hidden files.

    Folders are sorted as `name/`, so that whole names come out in order without being in memory all at once. The sort
    key is one string per entry, `name NUL stamp`, because a NUL sorts before every character that can follow in a name.
    """
    try:
        listing = os.scandir(folder)
    except OSError:  # no permission to read the folder
        return
    with listing:
        entries = [text for item in listing if not item.name.startswith(".") and (text := _list_entry(item))]
    entries.sort()
    for text in entries:
        name, _, stamp = text.partition("\0")
        if stamp:
            yield prefix + name, stamp
        else:
            yield from _images(os.path.join(folder, name[:-1]), prefix + name)


def _list_entry(entry: os.DirEntry[str]) -> str:
    """Return `name/` for a folder, `name NUL stamp` for an image, and "" for anything else."""
    if entry.is_dir():
        return "" if entry.is_symlink() else f"{entry.name}/"
    is_image = os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file()
    return f"{entry.name}\0{_stamp(entry.stat())}" if is_image else ""


def _stamp(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def decode_text(raw: bytes) -> str:
    """Decode a text file: UTF-8 or UTF-16 with a byte order mark, UTF-8 without one, or Windows-1252."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", errors="replace")
    for encoding in ENCODINGS:
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode("latin-1")
