"""Read the rows of a table: csv, tsv, jsonl, json or parquet, as a stream of named values.

A table is written by a user or by another tool. Its encoding is that of its byte order mark, UTF-8, or one that the
text itself tells (text_encoding.py). Every fault is a `BadTable`, with the number of the row.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ...errors import printable
from ...storage.bounded_files import MAX_DEPTH, Unusable, open_regular, read_json
from ..source.text_encoding import BOMS, ENOUGH_BYTES, encoding_of

MAX_LINE = 1 << 20  # characters of a row
MAX_JSON = 512 << 20  # bytes of a .json, which is read as a whole
DELIMITERS = "\t,;"
PARQUET_ROWS = 4096  # that are read at once
INSTALL_PYARROW = 'pyarrow is not installed; run pip install pyarrow, or pip install "chroma-trainer[parquet]"'

Values = Mapping[str, Any]


class BadTable(Exception):
    """A table can't be read. str() is the reason, for the user."""


def table_rows(path: Path) -> Iterator[tuple[int, Values]]:
    """Yield the number of each row, as the user counts them, and its values by column.

    Rows of csv, tsv and jsonl are numbered by the line on which they end, others from 1.

    Raises:
        BadTable: The file can't be read, or a row is damaged.
    """
    readers = {
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".parquet": _parquet_rows,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BadTable(f"has the ending {path.suffix!r}; tables end in {', '.join(readers)}")
    try:
        yield from reader(path)
    except Unusable as error:
        raise BadTable(str(error)) from error
    except UnicodeDecodeError as error:
        raise BadTable(f"is not valid {error.encoding.upper()}; save it as UTF-8") from error
    except OSError as error:
        raise BadTable(f"can't be read ({error.strerror or error})") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Values]]:
    decode = json.JSONDecoder().raw_decode  # half the time of json.loads, which also strips and detects encodings
    for number, line in _lines(path):
        text = line if line[0] == "{" else line.lstrip()
        if not text:
            continue
        try:
            values, end = decode(text)
        except RecursionError as error:
            raise BadTable(f"line {number} is nested more than {MAX_DEPTH} levels deep") from error
        except ValueError as error:
            raise BadTable(f"line {number} is not JSON: {getattr(error, 'msg', 'a number is too long')}") from error
        if len(text) - end > 1 and text[end:].strip():
            raise BadTable(f"line {number} is not JSON: there is more after its object; write one row on each line")
        if not isinstance(values, dict):
            raise BadTable(f'line {number} is not a JSON object, such as {{"file_name": "a.png", "text": "a cat"}}')
        yield number, values


def _csv_rows(path: Path) -> Iterator[tuple[int, Values]]:
    lines = (line for _, line in _lines(path))
    header = next(lines, "")
    delimiter = max(DELIMITERS, key=header.count)
    try:
        columns = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        if len(set(columns)) < len(columns):
            twice = next(name for name in columns if columns.count(name) > 1)
            raise BadTable(f"has two columns named {printable(twice)!r}; rename one")
        reader = csv.reader(lines, delimiter=delimiter)
        for cells in reader:
            number = reader.line_num + 1  # the header is line 1
            if len(cells) > len(columns):
                raise BadTable(
                    f"line {number} has {len(cells)} values, but there are {len(columns)} columns; put values that "
                    f"contain {delimiter!r} in quotes"
                )
            if cells:
                yield number, dict(zip(columns, cells, strict=False))
    except csv.Error as error:
        raise BadTable(f"is not a valid csv file: {error}") from error


def _json_rows(path: Path) -> Iterator[tuple[int, Values]]:
    """Yield the rows of a list of objects, or of an object by file name, as kohya's meta_cap.json."""
    value = read_json(path, MAX_JSON, finite=False)
    if isinstance(value, dict):
        rows: Any = (
            {"file_name": key, **(item if isinstance(item, dict) else {"caption": item})} for key, item in value.items()
        )
    elif isinstance(value, list):
        rows = value
    else:
        raise BadTable("is neither a list of rows nor an object with one row for each file name")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BadTable(f'row {number} is not an object, such as {{"file_name": "a.png", "text": "a cat"}}')
        yield number, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, Values]]:
    try:
        from pyarrow import ArrowException, parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BadTable(f"is a parquet file, and {INSTALL_PYARROW}") from error
    number = 0
    try:
        with os.fdopen(open_regular(path), "rb") as stream, parquet.ParquetFile(stream) as file:
            names = [name for name in file.schema_arrow.names if not _is_binary(file.schema_arrow.field(name).type)]
            for batch in file.iter_batches(PARQUET_ROWS, columns=names):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except ArrowException as error:
        raise BadTable(f"is not a valid parquet file: {str(error).splitlines()[0][:200]}") from error


def _is_binary(kind: Any) -> bool:
    """Return whether a column of a parquet file holds bytes, such as the images themselves, which are not read."""
    return "binary" in str(kind)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line, with its line break. Lines may be of any encoding, see the module."""
    encoding = _encoding(path)
    with io.TextIOWrapper(os.fdopen(open_regular(path), "rb"), encoding, newline="") as stream:
        read, number = stream.readline, 0
        while line := read(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise BadTable(f"line {number} has more than {MAX_LINE:,} characters; is it a table of captions?")
            if "\0" in line:
                raise BadTable(
                    f"line {number} contains a NUL character: it is damaged, or not a text; save it as UTF-8"
                )
            yield number, line


def _encoding(path: Path) -> str:
    """Return the encoding of a text file: of its byte order mark, UTF-8, or told by its lines that are not UTF-8."""
    with os.fdopen(open_regular(path), "rb") as stream:
        start = stream.read(4)
        for mark, encoding in BOMS:
            if start.startswith(mark):
                return encoding
        stream.seek(0)
        others = _not_utf8(stream)
    if not others:
        return "utf-8"
    encoding = encoding_of(others)
    if not encoding:
        raise BadTable("is not UTF-8, and its encoding can't be told for sure; save it as UTF-8")
    return encoding


def _not_utf8(stream: IO[bytes]) -> list[bytes]:
    """Return lines that are not UTF-8, up to ENOUGH_BYTES. Pieces that are ASCII are skipped as a whole."""
    others, size, rest = list[bytes](), 0, b""
    while (piece := stream.read(1 << 20)) and size < ENOUGH_BYTES:
        whole, _, rest = (rest + piece).rpartition(b"\n")
        if not whole and len(rest) > 4 * MAX_LINE:
            break  # reported with its line
        if whole.isascii() or _is_utf8(whole):
            continue
        for line in whole.split(b"\n"):
            if not _is_utf8(line):
                others.append(line)
                size += len(line)
    return others if _is_utf8(rest) or size >= ENOUGH_BYTES else [*others, rest]


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
