"""A dataset backend for a store with image files, and captions beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import UserError
from ...storage.atomic import write_atomic
from ..source.backend import Entry, LeftOut, printable_name, stem
from ..source.file_list import Entries
from ..source.folder import CONDITION_LABEL, CONDITIONS, MASK_LABEL, MASKS, TOOL_FOLDERS
from ..source.formats import is_readable, why_unreadable
from ..source.text_encoding import MAX_BYTES, UnreadableText, decode_regional, decode_unicode
from ..tables.caption_row import NAMES
from .stores.store import Missing, StoredFile
from .stores.store_files import StoreFiles

UNSAFE = re.compile(r"(^|/)\.{0,2}(/|$)|[\\:\x00-\x1f]")  # empty, . and .. as folders; separators of Windows


class StoreBackend:
    """The images of a store.

    Args:
        files: Its files.
        tables: Folder for the tables of captions that are read.
    """

    def __init__(self, files: StoreFiles, tables: Path):
        self.has_rows = False
        self.left_out = LeftOut()
        self.encodings: Counter[str] = Counter()
        self._files, self._tables = files, tables
        self._by_name: Mapping[str, StoredFile] = {}

    def entries(self) -> Sequence[Entry]:
        self.left_out = LeftOut()
        listed = self._files.list()
        self._by_name = {file.name: file for file in listed}
        return Entries((file.name, f"{file.size}-{file.stamp}") for file in listed if self._is_image(file.name))

    def read(self, name: str) -> bytes:
        return self._files.read(self._by_name[name])

    def caption_text(self, name: str) -> tuple[str | None, str]:
        raw, stamp = self._beside(name, ".txt")
        return (None, "") if raw is None else (self._decode(raw), stamp)

    def file_beside(self, name: str, suffix: str) -> bytes | None:
        return self._beside(name, suffix)[0]

    def path(self, name: str) -> str:
        return printable_name(f"{self._files.store.place}/{name}")

    def table_file(self, name: str) -> tuple[Path, Path]:
        """Download a table of captions.

        Args:
            name: Its name; "" for the first of the usual ones.
        Returns:
            The table, and the folder that stands for the store.
        Raises:
            UserError: There is none.
        """
        names = [name] if name else [other for other in NAMES if other in self._by_name]
        if not names or names[0] not in self._by_name:
            place = printable_name(self._files.store.place)
            text = f"{name!r} is not in {place}" if name else f"is empty, and {place} has none of {', '.join(NAMES)}"
            raise UserError.at("table", f"{text}; enter the name of the table")
        if UNSAFE.search(names[0]):  # a key may be anything, and the table is written to a folder
            raise UserError.at("table", f"{names[0]!r} can't be the name of a file here; rename it in the store")
        path = self._tables.joinpath(*names[0].split("/"))
        try:
            write_atomic(path, self._files.fetch(self._by_name[names[0]]).read_bytes())
        except Missing as error:
            raise UserError.at("table", f"{names[0]!r} can't be read: {error}") from error
        return path, self._tables

    def _is_image(self, name: str) -> bool:
        """Return whether a file is an image that is trained on; note why not, if it could be one."""
        folders, file = name.split("/")[:-1], name.rpartition("/")[2]
        suffix = f".{file.rpartition('.')[2].lower()}" if "." in file else ""
        location = self.path(name)
        if "\0" in name:
            self.left_out.add_unreadable(location, "its name has a NUL character")
            return False
        if not is_readable(suffix):
            if (reason := why_unreadable(suffix)) and not file.startswith("."):
                self.left_out.add_unreadable(location, reason)
            return False
        reason = self._why_left_out(folders, file)
        if reason:
            self.left_out.add_by_rule(location, reason)
        return not reason

    def _why_left_out(self, folders: Sequence[str], file: str) -> str:
        for folder in folders:
            if what := TOOL_FOLDERS.get(folder.lower()):
                return what
            if folder.startswith("."):
                return "hidden folders (their names start with a dot)"
        if file.startswith("."):
            return "hidden files (their names start with a dot)"
        if MASK_LABEL.search(stem(file)):
            return MASKS
        return CONDITIONS if CONDITION_LABEL.search(stem(file)) else ""

    def _beside(self, name: str, suffix: str) -> tuple[bytes | None, str]:
        file = self._by_name.get(stem(name) + suffix)
        if file is None:
            return None, ""
        if file.size > MAX_BYTES:
            raise UnreadableText(f"has {file.size >> 20} MiB; at most {MAX_BYTES >> 20} are read")
        return self._files.read(file), f"{file.size}-{file.stamp}"

    def _decode(self, raw: bytes) -> str:
        text = decode_unicode(raw)
        if text is None:
            text, encoding = decode_regional(raw, "")
            self.encodings[encoding] += 1
        return text
