"""One row for each image: its captions, the weight of its loss and boxes, from a table or from a .json file beside it.

A table is read once, in a stream. Its rows are kept in an unnamed, memory-mapped file, so that a million of them take
24 bytes of memory each.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import tempfile
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.dataset import FolderConfig
from ..errors import UserError, nearest, printable
from ..storage.bounded_files import Unusable, parse_json
from ..storage.digest_table import DigestTable, digests, first_of_each
from .boxes import Box
from .source.backend import Entry, printable_name, stem
from .source.table_files import BadTable, Values, table_rows

NAMES = (  # of tables that are found by themselves
    "metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.jsonl", "captions.csv", "captions.tsv",
    "captions.json", "captions.parquet", "meta_cap.json", "meta_lat.json",
)  # fmt: skip
FILE_COLUMNS = ("file_name", "filename", "image", "file", "path", "image_path", "key", "id")
CAPTION_COLUMNS = ("caption", "text", "prompt", "caption_or_tags", "tags")
KOHYA = "caption + tags"  # of a .json table with one of them, such as kohya's meta_cap.json: its scripts join both
WEIGHT, BOXES, IS_TAGS, SIZE = "loss_weight", "boxes", "is_tag_based", ("width", "height")
OTHERS = frozenset((WEIGHT, BOXES, IS_TAGS, SIZE[0]))
NUM_SHOWN = 5  # faults in an error message
BLOCK = 4096  # rows that are written at once
MAX_BOXES = 1000  # of an image
ABSOLUTE = re.compile(r"/|[A-Za-z]:/|\w+://")


@dataclass(frozen=True)
class Row:
    """What is known of an image beside its pixels.

    Attributes:
        captions: As they are written; () if there is none.
        loss_weight: Factor of its loss.
        boxes: Parts of the image that a crop should keep.
        is_tags: Whether the captions are lists of tags; None if that is not said.
        size: (width, height) of the image, as the table says; None if it does not.
    """

    captions: tuple[str, ...] = ()
    loss_weight: float = 1.0
    boxes: tuple[Box, ...] = ()
    is_tags: bool | None = None
    size: tuple[int, int] | None = None


EMPTY = Row()


class BadRow(Exception):
    """A row has a value that can't be used. str() is the reason, for the user."""


class Columns:
    """The columns that are read, chosen by the settings and by the columns that there are.

    Args:
        settings: With caption_column and file_column.
        names: The columns of the first row.
        is_table: Whether the rows name their files; those of a .json file beside an image do not.
        usual: caption_column where it is empty; "": the first of CAPTION_COLUMNS.
    Raises:
        BadTable: A column is missing.
    """

    def __init__(self, settings: FolderConfig, names: Iterable[str], is_table: bool, usual: str = ""):
        self._names = list(names)
        self.file = self._choose("file_column", settings.file_column, FILE_COLUMNS) if is_table else ""
        self._captions = list[list[list[str]]]()  # captions, of which the first alternative counts, which is a sum
        if not is_table or settings.captions == "table":
            self._captions = self._read_expression(settings.caption_column.strip() or usual, bool(usual))
        plain = self._captions[0][0] if len(self._captions) == 1 and len(self._captions[0]) == 1 else []
        self._only = plain[0] if len(plain) == 1 else ""  # the usual case: one column

    def _read_expression(self, text: str, is_usual: bool) -> list[list[list[str]]]:
        if not text:
            return [[[self._choose("caption_column", "", CAPTION_COLUMNS)]]]
        captions = [
            [[name.strip() for name in way.split("+")] for way in caption.split("|")]
            for caption in text.split(",")
            if caption.strip()
        ]
        for name in (name for caption in captions for way in caption for name in way):
            if not is_usual:
                self._choose("caption_column", name, ())
        return captions

    def _choose(self, field: str, name: str, usual: Sequence[str]) -> str:
        """Return a column by its name, or the first of the usual ones."""
        if name.strip():
            if name.strip() in self._names:
                return name.strip()
            hint = nearest(name.strip(), self._names)
            raise BadTable(f"has no column {name.strip()!r}, which {field} names{hint}; it has {self._listed()}")
        found = next((column for column in usual if column in self._names), None)
        if found is None:
            raise BadTable(
                f"has none of the columns {', '.join(usual)}; set {field} to one of its own: {self._listed()}"
            )
        return found

    def _listed(self) -> str:
        names = [printable(str(name))[:40] for name in self._names[:20]]
        return ", ".join(names) + (" ..." if len(self._names) > 20 else "") or "none"

    def packed(self, values: Values) -> bytes:
        """Return the row of an image as `_pack` does. The usual case, a caption and nothing else, takes half the time.

        Raises:
            BadRow: A value can't be used.
        """
        text = values.get(self._only)
        if type(text) is not str or not OTHERS.isdisjoint(values) or "\0" in text:
            return _pack(self.row(values))
        text = text.strip()
        return f"\0{text}".encode("utf-8", "surrogatepass") if text else b""

    def row(self, values: Values) -> Row:
        """Return the row of an image.

        Raises:
            BadRow: A value can't be used.
        """
        weight, boxes, tags = values.get(WEIGHT), values.get(BOXES), values.get(IS_TAGS)
        if self._only and type(text := values.get(self._only)) is str:
            captions = (text.strip(),) if text and not text.isspace() else ()
        else:
            captions = tuple(text for caption in self._captions for text in _first_of(caption, values))
        if weight is None and boxes is None and tags is None and "width" not in values:
            return Row(captions)
        return Row(captions, _weight_of(weight), _boxes_of(boxes), _flag_of(tags), _size_of(values))


def _first_of(ways: list[list[str]], values: Values) -> list[str]:
    for way in ways:
        parts = [_texts_of(values.get(name), name) for name in way]
        if len(way) > 1:
            return [", ".join(text for texts in parts for text in texts)] if any(parts) else []
        if parts[0]:
            return parts[0]
    return []


def _texts_of(value: Any, name: str) -> list[str]:
    """Return the captions in a cell: a text, or a list of texts."""
    if value is None or isinstance(value, str):
        texts = [value or ""]
    elif isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
        texts = list(value)
    else:
        raise BadRow(f"its {name} is {_short(value)}, not a text or a list of texts")
    return [text.strip() for text in texts if text.strip()]


def _weight_of(value: Any) -> float:
    if value is None or value == "":
        return 1.0
    number = _number(value)
    if not 0 <= number <= 1000:
        raise BadRow(f"its {WEIGHT} is {_short(value)}, not a number from 0 to 1000")
    return number


def _flag_of(value: Any) -> bool | None:
    if value is None or value == "":
        return None
    text = str(value).strip().lower()
    if text not in ("true", "false", "1", "0", "1.0", "0.0", "yes", "no"):
        raise BadRow(f"its {IS_TAGS} is {_short(value)}, neither true nor false")
    return text in ("true", "1", "1.0", "yes")


def _size_of(values: Values) -> tuple[int, int] | None:
    width, height = (_number(values.get(name)) for name in SIZE)
    return (int(width), int(height)) if 1 <= width < 1e6 and 1 <= height < 1e6 else None


def _boxes_of(value: Any) -> tuple[Box, ...]:
    """Return boxes: [left, top, right, bottom] or {"x", "y", "width", "height"}, one or a list of them, or as JSON."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except Unusable as error:
            raise BadRow(f"its {BOXES} {error}; write [[left, top, right, bottom]]") from error
    if isinstance(value, dict) or (
        isinstance(value, list) and len(value) == 4 and not isinstance(value[0], list | dict)
    ):
        value = [value]
    if not isinstance(value, list) or len(value) > MAX_BOXES:
        raise BadRow(
            f"its {BOXES} is {_short(value)}, not a list of up to {MAX_BOXES} boxes [left, top, right, bottom]"
        )
    return tuple(map(_box_of, value))


def _box_of(value: Any) -> Box:
    if isinstance(value, dict):
        left, top, width, height = (_number(value.get(name)) for name in ("x", "y", "width", "height"))
        edges = [left, top, left + width, top + height]
    else:
        edges = [_number(item) for item in value] if isinstance(value, list) and len(value) == 4 else [math.nan] * 4
    if not (all(map(math.isfinite, edges)) and edges[0] < edges[2] and edges[1] < edges[3]):
        raise BadRow(
            f"its {BOXES} have {_short(value)}, not [left, top, right, bottom] with left < right and top < bottom"
        )
    return edges[0], edges[1], edges[2], edges[3]


def _number(value: Any) -> float:
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _short(value: Any) -> str:
    text = printable(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


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
        names = _shared_folder_removed(names)
        keys = digests(names)
        self._table = DigestTable(keys, np.arange(len(names), dtype=np.int32))
        if self._table.has_duplicates():
            raise _duplicate(self.name, names, lines, first_of_each(keys), keys)
        prefix = path.parent.relative_to(root).as_posix() + "/" if path.is_relative_to(root) else "./"
        self._rows = self._match(entries, "" if prefix == "./" else prefix)
        used, counts = np.unique(self._rows[self._rows >= 0], return_counts=True)
        self._shared = used[counts > 1]  # rows of several images
        is_used = np.zeros(len(names), dtype=bool)
        is_used[used] = True
        unused = np.flatnonzero(~is_used)
        self.num_unused = len(unused)
        self.unused = printable_name(names[int(unused[0])]) if len(unused) else ""
        self.first_name = printable_name(names[0]) if names else ""

    def _match(self, entries: Sequence[Entry], prefix: str) -> np.ndarray:
        """Return the index of each image's row, or -1: by its whole name, without its extension, or without folders."""
        rows = np.full(len(entries), -1, dtype=np.int64)
        ways: list[Callable[[str], str]] = [
            lambda name: name.removeprefix(prefix),
            lambda name: stem(name.removeprefix(prefix)),
            lambda name: name.rpartition("/")[2],
            lambda name: stem(name.rpartition("/")[2]),
        ]
        for way in ways:
            missing = np.flatnonzero(rows < 0)
            if not len(missing):
                break
            images = entries if len(missing) == len(entries) else (entries[i] for i in missing.tolist())
            found = self._table.find(digests(way(entry.name) for entry in images))
            rows[missing] = np.where(found >= 0, self._table.values[found] if len(self._table) else -1, -1)
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
        return _unpack(str(self._text[begin : int(self._ends[index])], "utf-8", "surrogatepass"))


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
                    packed = columns.packed(values)
                except BadRow as fault:
                    num_faults += 1
                    faults += [f"row {number}: {fault}"] if len(faults) < NUM_SHOWN else []
                    continue
                names.append(name)
                lines.append(number)
                end += len(packed)
                ends.append(end)
                pieces.append(packed)
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


def _shared_folder_removed(names: list[str]) -> list[str]:
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


def _pack(row: Row) -> bytes:
    """Return a row as text: JSON of what is no caption, and the captions, which contain no NUL."""
    if row.loss_weight == 1.0 and row.is_tags is None and row.size is None and not row.boxes:
        head = ""
    else:
        head = json.dumps([row.loss_weight, row.is_tags, row.size, row.boxes])
    for caption in row.captions:
        if "\0" in caption:
            raise BadRow("its caption contains a NUL character")
    return "\0".join((head, *row.captions)).encode("utf-8", "surrogatepass")


def _unpack(text: str) -> Row:
    head, *captions = text.split("\0")
    if not head:
        return Row(tuple(captions))
    weight, is_tags, size, boxes = json.loads(head)
    return Row(tuple(captions), weight, tuple(map(tuple, boxes)), is_tags, tuple(size) if size else None)


def json_row(raw: bytes, settings: FolderConfig) -> Row:
    """Return the row in a .json file beside an image: an object with columns, a text, or a list of texts.

    Raises:
        BadRow: It is not JSON, or has no such column, or a value that can't be used.
    """
    try:
        value = parse_json(raw)
    except Unusable as error:
        raise BadRow(str(error)) from error
    if isinstance(value, str | list):
        return Row(tuple(_texts_of(value, "value")))
    if not isinstance(value, Mapping):
        raise BadRow("is neither an object nor a text")
    try:
        return Columns(settings, value, False).row(value)
    except BadTable as error:
        raise BadRow(str(error)) from error
