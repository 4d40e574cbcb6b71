"""What is known of each image of a folder beside its pixels: captions, the weight of its loss, boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.dataset import DatasetConfig, FolderConfig
from ..captions import written_captions
from ..source.backend import Backend, Entry, printable_name, stem
from ..source.text_encoding import UnreadableText
from .caption_row import EMPTY, BadRow, Row, json_row

if TYPE_CHECKING:
    from .caption_table import CaptionTable

IN_STORE = "@"  # in front of the name of a table that lies in a store
NO_CAPTION = "its caption file"  # prefix of every reason that is about caption files


class NoCaption(Exception):
    """An image can't be used for want of a caption, or because of what its row says. str() is the reason."""


class CaptionSource:
    """The row of every image of a folder.

    Args:
        settings: Those of the folder.
        backend: The folder.
        table: Its table; None if it has none.
    """

    def __init__(self, settings: FolderConfig, backend: Backend, table: CaptionTable | None = None):
        self.settings, self.backend, self.table = settings, backend, table

    @classmethod
    def open(cls, config: DatasetConfig, part: int, backend: Backend, entries: Sequence[Entry]) -> CaptionSource:
        """Read the table of a part, if it has one.

        Raises:
            UserError: The table can't be used.
        """
        path = config.tables[part] if config.tables else ""
        if not path:
            return cls(config.parts[part], backend)
        from .caption_table import CaptionTable  # here, because it imports numpy, and most checks need none

        table, root = Path(path), Path(config.roots[part])
        if path.startswith(IN_STORE):
            from ..places.store_backend import StoreBackend

            assert isinstance(backend, StoreBackend), path
            table, root = backend.table_file(path.removeprefix(IN_STORE))
        return cls(config.parts[part], backend, CaptionTable(table, config.parts[part], root, entries))

    def row(self, number: int, name: str) -> Row:
        """Return the row of an image, with at least one caption.

        Args:
            number: Index of the image in the folder.
            name: Name of the image.
        Raises:
            NoCaption: There is no caption, or it can't be read.
        """
        try:
            row = self.table.row(number, name) if self.table else None
            has_rows = self.backend.has_rows and self.settings.captions in ("textfile", "table") and not self.table
            if self.settings.captions == "table" and not has_rows:
                return self._with_caption(row)
            if self.settings.captions == "json file" or has_rows:
                own = self._json(name)
                return replace(row, captions=own.captions) if row else own
        except BadRow as error:
            raise NoCaption(str(error)) from error
        return replace(row or EMPTY, captions=self._read(name))

    def _with_caption(self, row: Row | None) -> Row:
        assert self.table, "captions is table, but no table was opened"
        if row is None:
            raise NoCaption(f"{self.table.name} has no row for it (its first row is for {self.table.first_name!r})")
        if not row.captions:
            raise NoCaption(f"its caption in {self.table.name} is empty")
        return row

    def _json(self, name: str) -> Row:
        shown = "its row" if self.backend.has_rows else f"{NO_CAPTION} {_file(name, '.json')}"
        try:
            raw = self.backend.file_beside(name, ".json")
            if raw is None:
                raise NoCaption(f"{shown} is missing")
            row = json_row(raw, self.settings)
        except OSError as error:
            raise NoCaption(f"{shown} can't be read ({error.strerror or error})") from error
        except (BadRow, UnreadableText) as error:
            raise NoCaption(f"{shown}: {error}") from error
        if not row.captions:
            raise NoCaption(f"{shown} has an empty caption")
        return row

    def _read(self, name: str) -> tuple[str, ...]:
        text = None
        shown = f"{NO_CAPTION} {_file(name, '.txt')}"
        try:
            if self.settings.captions == "textfile":
                text, _ = self.backend.caption_text(name)
        except OSError as error:
            raise NoCaption(f"{NO_CAPTION} can't be read ({error.strerror or error})") from error
        except UnreadableText as error:
            raise NoCaption(f"{shown} {error}") from error
        if self.settings.captions == "filename" and printable_name(name) != name:
            raise NoCaption("its name is its caption, and is not UTF-8 or has control characters; rename it")
        captions = written_captions(name, text, self.settings)
        if not captions:
            raise NoCaption(f"{shown} {'is empty' if text is not None else 'is missing'}")
        return captions


def _file(name: str, suffix: str) -> str:
    return Path(stem(printable_name(name)) + suffix).name


def tables_report(sources: Sequence[CaptionSource]) -> list[dict[str, Any]]:
    """Return, for each table, its rows that name no image of the folder."""
    return [
        {"table": source.table.name, "unused_rows": source.table.num_unused, "example": source.table.unused}
        for source in sources
        if source.table
    ]
