"""A local folder, with its subfolders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .contract import Entry

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
ENCODINGS = ("utf-8-sig", "cp1252")  # editors on Windows still save the second


class FolderBackend:
    """Images below a root; a caption is the .txt of the same name."""

    def __init__(self, root: Path):
        self.root = Path(root)

    def entries(self) -> Sequence[Entry]:
        found = []
        for path in self.root.rglob("*"):
            name = path.relative_to(self.root).as_posix()
            hidden = any(part.startswith(".") for part in name.split("/"))
            if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
                found.append(Entry(name, _stamp(path)))
        return sorted(found, key=lambda entry: entry.name)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def caption_text(self, name: str) -> tuple[str | None, str]:
        path = (self.root / name).with_suffix(".txt")
        if not path.is_file():
            return None, ""
        return decode_text(path.read_bytes()), _stamp(path)

    def path(self, name: str) -> str:
        return str(self.root / name)


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def decode_text(raw: bytes) -> str:
    """Text in UTF-8 or UTF-16 with a mark, UTF-8 without, or else Windows' Latin."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", errors="replace")
    for encoding in ENCODINGS:
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode("latin-1")
