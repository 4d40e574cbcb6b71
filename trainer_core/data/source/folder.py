"""A local folder, with its subfolders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .backend import Entry
from .file_list import Entries

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
ENCODINGS = ("utf-8-sig", "cp1252")  # editors on Windows still save the second


class FolderBackend:
    """Images below a root; a caption is the .txt of the same name."""

    def __init__(self, root: Path):
        self.root = str(root)  # strings: a Path for each of ten thousand names is a quarter of a second

    def entries(self) -> Sequence[Entry]:
        return Entries(_images(self.root, ""))

    def read(self, name: str) -> bytes:
        with open(self.path(name), "rb") as file:
            return file.read()

    def caption_text(self, name: str) -> tuple[str | None, str]:
        path = os.path.splitext(self.path(name))[0] + ".txt"
        try:
            with open(path, "rb") as file:
                return decode_text(file.read()), _stamp(os.fstat(file.fileno()))
        except FileNotFoundError:
            return None, ""
        except OSError:
            if os.path.isdir(path):
                return None, ""
            raise

    def path(self, name: str) -> str:
        return os.path.join(self.root, *name.split("/"))


def _images(folder: Path | str, prefix: str) -> Iterator[tuple[str, str]]:
    """Names of images below a folder and their stamps, in the order of their names; hidden ones are left out.

    Folders are sorted as `name/`, which puts whole names in order without having them all at once. What is sorted is one
    string for each, `name NUL stamp`: a NUL comes before all that a name can go on with.
    """
    try:
        listing = os.scandir(folder)
    except OSError:  # a folder without the right to read it
        return
    with listing:
        found = [text for entry in listing if not entry.name.startswith(".") and (text := _list_entry(entry))]
    found.sort()
    for text in found:
        name, _, stamp = text.partition("\0")
        if stamp:
            yield prefix + name, stamp
        else:
            yield from _images(os.path.join(folder, name[:-1]), prefix + name)


def _list_entry(entry: os.DirEntry[str]) -> str:
    """`name/` of a folder, `name NUL stamp` of an image, nothing of all else."""
    if entry.is_dir():
        return "" if entry.is_symlink() else f"{entry.name}/"
    is_image = os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file()
    return f"{entry.name}\0{_stamp(entry.stat())}" if is_image else ""


def _stamp(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def decode_text(raw: bytes) -> str:
    """Text in UTF-8 or UTF-16 with a mark, UTF-8 without, or else Windows' Latin."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", errors="replace")
    for encoding in ENCODINGS:
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode("latin-1")
