"""The workflow's JSON out of a file: itself, a PNG's text, or a safetensors header. The API form first, where there are both."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..problems import UserError
from .inspection import read_header

MAX_BYTES = 64 << 20  # of workflow text; the largest seen in the wild are near 5 MB
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
KEYS = ("prompt", "workflow")


def read_carrier(path: Path) -> Any:
    """The JSON value in a file, by what the file is rather than by its name.

    Raises:
        UserError: can't be read, carries none, or carries something that is no JSON.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
    except IsADirectoryError as error:
        raise UserError.at(str(path), "is a folder; name a workflow file in it") from error
    except OSError as error:
        if path.is_dir():  # Windows says "permission denied" to a folder
            raise UserError.at(str(path), "is a folder; name a workflow file in it") from error
        raise UserError.at(str(path), f"can't be read: {error.strerror or error}") from error
    if start.startswith(PNG_MAGIC):
        return _first(path, dict(_png_texts(path)), "picture", "drag it into ComfyUI to see; ComfyUI writes it unless started with --disable-metadata")
    if path.suffix.lower() == ".safetensors" or start[8:9] == b"{":
        return _first(path, read_header(path).get("__metadata__", {}), "file", "only LoRAs that ChromaTrainer wrote carry one")
    if path.stat().st_size > MAX_BYTES:
        raise UserError.at(str(path), f"is {path.stat().st_size >> 20} MiB large; a workflow has at most {MAX_BYTES >> 20}")
    return parse(path.read_bytes(), str(path))


def parse(raw: bytes, where: str) -> Any:
    """JSON from UTF-8 bytes, a byte order mark allowed.

    Raises:
        UserError: not UTF-8, not JSON, nested too deeply.
    """
    if not raw.strip():
        raise UserError.at(where, "is empty; export the workflow again")
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError.at(where, f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError.at(where, f"is not JSON: {error.msg} in line {error.lineno}, column {error.colno}; export the workflow again") from error
    except (RecursionError, ValueError) as error:
        raise UserError.at(where, "is nested too deeply to be a workflow; export it again") from error


def _first(path: Path, texts: Any, what: str, remedy: str) -> Any:
    texts = texts if isinstance(texts, dict) else {}
    for key in KEYS:
        if isinstance(texts.get(key), str):
            return parse(texts[key].encode("utf-8", "surrogatepass"), f"{path} ({key})")
    raise UserError.at(str(path), f"the {what} carries no workflow; {remedy}")


def _png_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Keyword and text of a PNG's text chunks. A picture that breaks off gives what came before."""
    with path.open("rb") as stream:
        stream.seek(len(PNG_MAGIC))
        while len(head := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"IEND" or length > MAX_BYTES:
                return
            if kind not in (b"tEXt", b"zTXt", b"iTXt"):
                stream.seek(length + 4, 1)
                continue
            body = stream.read(length)
            stream.seek(4, 1)
            text = _chunk_text(kind, body) if len(body) == length else None
            if text:
                yield text


def _chunk_text(kind: bytes, body: bytes) -> tuple[str, str] | None:
    """PNG 1.2, chapter 4.2.3: keyword NUL, then by kind; None where the chunk is broken."""
    keyword, nul, rest = body.partition(b"\0")
    try:
        if kind == b"zTXt":
            raw = _inflate(rest[1:])
        elif kind == b"iTXt":
            compressed, rest = rest[:1] == b"\1", rest[2:]
            raw = rest.split(b"\0", 2)[2]
            raw = _inflate(raw) if compressed else raw
        else:
            raw = rest
    except (zlib.error, IndexError):
        return None
    return (keyword.decode("latin-1"), _decode(raw)) if nul else None


def _inflate(raw: bytes) -> bytes:
    return zlib.decompressobj().decompress(raw, MAX_BYTES)


def _decode(raw: bytes) -> str:
    """tEXt is Latin-1 by the standard; some writers put UTF-8 there, and ComfyUI's own JSON is plain ASCII."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")
