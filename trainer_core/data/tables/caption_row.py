"""What a table, or a .json file beside an image, says of the image: captions, the weight of its loss, boxes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...config.dataset import FolderConfig
from ...errors import nearest, printable
from ...storage.bounded_files import Unusable, parse_json
from .table_files import BadTable, Values

NAMES = (  # of tables that are found by themselves
    "metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.jsonl", "captions.csv", "captions.tsv",
    "captions.json", "captions.parquet", "meta_cap.json", "meta_lat.json",
)  # fmt: skip
FILE_COLUMNS = ("file_name", "filename", "image", "file", "path", "image_path", "key", "id")
CAPTION_COLUMNS = ("caption", "text", "prompt", "caption_or_tags", "tags")
KOHYA = "caption + tags"  # of a .json table with one of them, such as kohya's meta_cap.json: its scripts join both
WEIGHT, BOXES, IS_TAGS, SIZE = "loss_weight", "boxes", "is_tag_based", ("width", "height")
OTHERS = frozenset((WEIGHT, BOXES, IS_TAGS, SIZE[0]))
MAX_BOXES = 1000  # of an image

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the upright image


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
            raise BadTable(f"has no column {name.strip()!r}, which {field} names; it has {self._list_names()}{hint}")
        first = next((column for column in usual if column in self._names), None)
        if first is None:
            raise BadTable(
                f"has none of the columns {', '.join(usual)}; set {field} to one of its own: {self._list_names()}"
            )
        return first

    def _list_names(self) -> str:
        names = [printable(str(name))[:40] for name in self._names[:20]]
        return ", ".join(names) + (" ..." if len(self._names) > 20 else "") or "none"

    def pack(self, values: Values) -> bytes:
        """Return the row of an image as `pack_row` does. The usual case, a caption and nothing else, takes half the time.

        Raises:
            BadRow: A value can't be used.
        """
        text = values.get(self._only)
        if type(text) is not str or not OTHERS.isdisjoint(values) or "\0" in text:
            return pack_row(self.row(values))
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


def pack_row(row: Row) -> bytes:
    """Return a row as text: JSON of what is no caption, and the captions, which contain no NUL."""
    if row.loss_weight == 1.0 and row.is_tags is None and row.size is None and not row.boxes:
        head = ""
    else:
        head = json.dumps([row.loss_weight, row.is_tags, row.size, row.boxes])
    for caption in row.captions:
        if "\0" in caption:
            raise BadRow("its caption contains a NUL character")
    return "\0".join((head, *row.captions)).encode("utf-8", "surrogatepass")


def unpack_row(text: str) -> Row:
    head, *captions = text.split("\0")
    if not head:
        return Row(tuple(captions))
    weight, is_tags, size, boxes = json.loads(head)
    return Row(tuple(captions), weight, tuple(map(tuple, boxes)), is_tags, tuple(size) if size else None)
