"""Read the text chunks of a PNG without decoding the image."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from ..storage.bounded_files import open_regular

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 100_000  # of one file; an image of 100 MB has 12,000


def read_texts(path: Path, max_bytes: int) -> dict[str, str]:
    """Return {keyword: text}.

    The first chunk of a keyword counts. Broken chunks, and everything after a truncation, are ignored.

    Args:
        path: The file.
        max_bytes: Maximum size of all texts together, uncompressed. Those after it are left out.
    Source: PNG specification 1.2, chapter 4.2.3.
    """
    texts: dict[str, str] = {}
    with os.fdopen(open_regular(path), "rb") as stream:
        stream.seek(len(PNG_MAGIC))
        for _ in range(MAX_CHUNKS):
            head = stream.read(8)
            if len(head) < 8 or head.endswith(b"IEND"):
                break
            length, kind = struct.unpack(">I4s", head)
            pair = _read_text(kind, stream, length, max_bytes)
            if pair:
                texts.setdefault(*pair)
                max_bytes -= len(pair[1])
    return texts


def _read_text(kind: bytes, stream: BinaryIO, length: int, max_bytes: int) -> tuple[str, str] | None:
    """Return the keyword and text of a chunk, None for any other chunk. Moves the stream past the chunk's checksum."""
    if kind not in (b"tEXt", b"zTXt", b"iTXt") or length > max_bytes:
        stream.seek(length + 4, 1)
        return None
    body = stream.read(length)
    stream.seek(4, 1)
    keyword, _, rest = body.partition(b"\0")
    try:
        if kind == b"zTXt":  # compression method, text
            rest = _inflate(rest[1:], max_bytes)
        elif kind == b"iTXt":  # compression flag, compression method, language NUL, translated keyword NUL, text
            text = rest[2:].split(b"\0", 2)[2]
            rest = _inflate(text, max_bytes) if rest[:1] == b"\1" else text
    except (zlib.error, IndexError):
        return None
    return (keyword.decode("latin-1"), _decode(rest)) if len(body) == length else None


def _inflate(raw: bytes, max_bytes: int) -> bytes:
    return zlib.decompressobj().decompress(raw, max_bytes) if max_bytes > 0 else b""  # 0 means no limit to zlib


def _decode(raw: bytes) -> str:
    """Decode UTF-8, or else Latin-1.

    tEXt is Latin-1 by the standard, but some programs write UTF-8. ComfyUI's JSON is plain ASCII.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")
