"""Read files that may hold anything: only regular files, only so many bytes, and JSON only to some depth.

A run folder, a model or a workflow may be damaged, or come from somebody else. Every failure is an OSError or an
Unusable, so that no caller has to know what else a parser can raise.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

MAX_DEPTH = 100  # levels of nesting; ComfyUI's deepest workflows have about 12
NAME_BYTES, PATH_BYTES = 255, 4000  # limits of the common file systems
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a fifo would block until written


class Unusable(ValueError):
    """The content of a file can't be used. str() is the reason, for the user."""


def read_regular(path: Path | str, max_bytes: int) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: The file.
        max_bytes: Larger files are refused, before they are read.

    Raises:
        OSError: The file does not exist or can't be read.
        Unusable: It is not a regular file (but a device or a fifo, for example), it is too large, or its path has a
            NUL.
    """
    handle = open_regular(path)
    with os.fdopen(handle, "rb") as stream:
        size = os.fstat(handle).st_size
        raw = b"" if size > max_bytes else stream.read(max_bytes + 1)  # it may be growing
    if max(size, len(raw)) > max_bytes:
        raise Unusable(f"is {format_size(size)} in size; the limit is {format_size(max_bytes)}")
    return raw


def open_regular(path: Path | str) -> int:
    """Open a regular file for reading, without waiting.

    Returns:
        The file descriptor.
    Raises:
        OSError, Unusable: As for read_regular.
    """
    if "\0" in str(path):
        raise Unusable("has a NUL character in its path")
    try:
        handle = os.open(path, OPEN_FLAGS)
    except PermissionError as error:
        if os.path.isdir(path):  # Windows opens no folders
            raise Unusable("is a folder") from error
        raise
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise Unusable("is a folder" if stat.S_ISDIR(mode) else "is not a regular file")
    return handle


def parse_json(raw: bytes | str, finite: bool = True) -> Any:
    """Parse JSON from a text, or from UTF-8 bytes with or without a byte order mark.

    Args:
        raw: The text.
        finite: Refuse NaN and infinite numbers, which Python's parser accepts although they are not JSON.
    Raises:
        Unusable: It is not JSON, nested too deeply, or has a number with thousands of digits.
    """
    try:
        value = json.loads(raw if isinstance(raw, str) else raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unusable(f"is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise Unusable(f"is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise Unusable(f"is nested more than {MAX_DEPTH} levels deep") from error
    except ValueError as error:  # an integer with thousands of digits
        raise Unusable("has a number that is too long") from error
    check_values(value, finite)
    return value


def check_values(value: Any, finite: bool = True) -> None:
    """Check the nesting of a JSON value, without recursion.

    Raises:
        Unusable: It is nested too deeply, or has a number that is not finite (where `finite` is set).
    """
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise Unusable(f"is nested more than {MAX_DEPTH} levels deep")
        if finite and any(isinstance(item, float) and not math.isfinite(item) for item in level):
            raise Unusable("has a number that is not finite, which is not JSON")
        level = [child for item in level for child in _children(item)]
        depth += 1


def _children(item: Any) -> Any:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list | tuple) else ()


def read_json(path: Path | str, max_bytes: int, finite: bool = True) -> Any:
    """Return the JSON value in a regular file.

    Raises:
        OSError: The file does not exist or can't be read.
        Unusable: See read_regular and parse_json.
    """
    return parse_json(read_regular(path, max_bytes), finite)


def format_size(size: int) -> str:
    """Return a size in words, such as "64 MiB"."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << power:
            return f"{size / (1 << power):.3g} {unit}"
    return f"{size} bytes"


def path_fault(text: str) -> str:
    """Return why a text can't be a path on any system, in words; "" if it can."""
    raw = text.encode("utf-8", "surrogatepass")
    longest = max(map(len, raw.replace(b"\\", b"/").split(b"/")))
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return "is not valid UTF-8; write the path again"
    if b"\0" in raw:
        return "has a NUL character; write the path again"
    if longest > NAME_BYTES:
        return f"has a name of {longest} bytes; file systems allow {NAME_BYTES}"
    return f"is {len(raw)} bytes long; use at most {PATH_BYTES}" if len(raw) > PATH_BYTES else ""
