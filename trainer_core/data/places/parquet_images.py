"""Images in the rows of parquet files, as datasets on the Hugging Face Hub have them: {"bytes": ..., "path": ...}."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError, reason_of
from ..tables.table_files import INSTALL_PYARROW

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "picture", "photo")
ROWS_AT_ONCE = 64  # whose images are in memory


@dataclass(frozen=True)
class ParquetRow:
    """A row of a parquet file.

    Attributes:
        number: From 0.
        path: Name of the image, as the file says; "" if it does not.
        values: The other values.
    """

    number: int
    path: str
    values: Mapping[str, Any]


def parquet_rows(path: Path, shown: str) -> Iterator[ParquetRow]:
    """Yield the rows of a file, without their images.

    Raises:
        UserError: It is not a parquet file with images, or pyarrow is missing.
    """
    with _open(path, shown) as file:
        column = image_column(file, shown)
        others = [name for name in file.schema_arrow.names if not _holds_bytes(file.schema_arrow.field(name).type)]
        paths = [f"{column}.path"] if _is_struct(file, column, "path") else []
        number = 0
        for batch in file.iter_batches(4096, columns=[*others, *paths]):
            for values in batch.to_pylist():
                image = values.pop(column, None) if paths else None
                name = image.get("path") if isinstance(image, dict) else None
                yield ParquetRow(number, name if isinstance(name, str) else "", values)
                number += 1


def parquet_images(path: Path, shown: str, first: int, last: int) -> Iterator[tuple[int, bytes]]:
    """Yield the number and bytes of the images of the row groups that hold the rows first to last - 1.

    Raises:
        UserError: As for parquet_rows.
    """
    with _open(path, shown) as file:
        column = image_column(file, shown)
        number = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if number < last and number + count > first:
                at = number
                columns = [f"{column}.bytes"] if _is_struct(file, column, "bytes") else [column]
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
                    for value in batch.column(0).to_pylist():
                        raw = value.get("bytes") if isinstance(value, dict) else value
                        yield at, raw if isinstance(raw, bytes) else b""
                        at += 1
            number += count


def image_column(file: Any, shown: str) -> str:
    """Return the column with the images.

    Raises:
        UserError: There is none, or there are several.
    """
    names = [name for name in file.schema_arrow.names if _holds_bytes(file.schema_arrow.field(name).type)]
    usual = [name for name in IMAGE_COLUMNS if name in names]
    if usual or len(names) == 1:
        return usual[0] if usual else names[0]
    columns = ", ".join(file.schema_arrow.names[:20])
    what = f"several columns with bytes ({', '.join(names)})" if names else f"no column with images ({columns})"
    raise UserError.at("folder", f"{shown} has {what}; name the column of the images image")


def _holds_bytes(kind: Any) -> bool:
    text = str(kind)
    return text in ("binary", "large_binary") or (text.startswith("struct<") and "bytes: " in text)


def _is_struct(file: Any, column: str, part: str) -> bool:
    text = str(file.schema_arrow.field(column).type)
    return text.startswith("struct<") and f"{part}: " in text


def _open(path: Path, shown: str) -> Any:
    try:
        from pyarrow import ArrowException, parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError.at("folder", f"{shown} is a parquet file, and {INSTALL_PYARROW}") from error
    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise UserError.at("folder", f"{shown} is not a valid parquet file: {reason_of(error)[:200]}") from error
