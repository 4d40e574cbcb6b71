"""Check from its structure whether an image file is complete, 100 times as fast as decoding it.

The usual defect is a truncated file. PNG has a checksum per chunk, JPEG an end marker, and WebP its length. Files that
can't be checked this way are decoded.
"""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

from .decode import is_bomb

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
TAIL_BYTES = 4096  # some cameras append data after the end marker
ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
PNG_MAY_TURN = (b"eXIf", b"iTXt", b"zTXt", b"tEXt", b"acTL")  # may contain an orientation, or several frames


def upright_size(raw: bytes) -> tuple[int, int] | None:
    """Return the upright (width, height) if the file is certainly complete; None if it must be decoded to find out."""
    if not _is_whole(raw):
        return None
    try:
        with Image.open(io.BytesIO(raw)) as image:
            if image.width * image.height == 0 or is_bomb(image, raw) or getattr(image, "n_frames", 1) != 1:
                return None
            turned = image.format != "PNG" and image.getexif().get(ORIENTATION) in TURNED
            return (image.height, image.width) if turned else image.size
    except Exception:  # every Pillow plugin raises its own errors
        return None


def _is_whole(raw: bytes) -> bool:
    if raw.startswith(PNG):
        return _is_whole_png(raw)
    if raw.startswith(JPEG):
        return b"\xff\xd9" in raw[-TAIL_BYTES:]
    if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        return len(raw) >= 8 + struct.unpack("<I", raw[4:8])[0]
    return False


def _is_whole_png(raw: bytes) -> bool:
    """Return whether every chunk is complete and has the right checksum, and none can rotate the image."""
    view, offset = memoryview(raw), len(PNG)
    while offset + 12 <= len(raw):
        (length,) = struct.unpack(">I", view[offset : offset + 4])
        kind = bytes(view[offset + 4 : offset + 8])
        end = offset + 8 + length
        if kind in PNG_MAY_TURN or end + 4 > len(raw):
            return False
        if zlib.crc32(view[offset + 4 : end]) != struct.unpack(">I", view[end : end + 4])[0]:
            return False
        if kind == b"IEND":
            return True
        offset = end + 4
    return False
