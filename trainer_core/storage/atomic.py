"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HASH_CHUNK_BYTES = 1 << 20
TEMPORARY = ".tmp-"  # how names of temporary files begin
RENAME_TRIES, RENAME_WAIT_SECONDS = 6, 0.2


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write to a temporary file beside the target, fsync, rename. The target is the old file or the new one, never between.

    Raises:
        OSError: disk full, read-only, name too long; the old file is intact and no temporary file is left.
    """
    raw = data.encode("utf-8") if isinstance(data, str) else data
    replace_atomic(path, lambda temporary: temporary.write_bytes(raw))


def write_json(path: Path, value: Any) -> None:
    """JSON with two spaces of indent and a final newline, written atomically. NaN is refused: it is not JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def fault_of(folder: Path) -> str:
    """Why nothing can be written into a folder, "" where it can. Makes the folder where it is not there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def replace_atomic(path: Path, write: Callable[[Path], Any], staging: Path | None = None) -> None:
    """Let `write` fill a temporary file, then fsync it and rename it over the target.

    Args:
        staging: existing folder for the temporary file, where a process that is killed may leave it; used if it lies on the
            target's file system. Else the target's own folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    near = staging and staging.stat().st_dev == path.parent.stat().st_dev
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=staging if near else path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)  # mkstemp makes 0600; a LoRA is read by other users of the machine as well
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_temporaries(folder: Path, older_than: float = 0.0) -> None:
    """Delete what killed processes left of replace_atomic in a folder and in those below it. older_than: seconds, where others may be writing there now."""
    for path in folder.rglob(f"{TEMPORARY}*"):
        try:
            if path.is_file() and time.time() - path.stat().st_mtime >= older_than:
                path.unlink()
        except OSError:  # another process was faster, or holds it
            continue


def rename(source: Path, target: Path) -> None:
    """os.replace, tried again for a second where another program has the target or the source open.

    Windows refuses to rename what a virus scanner, an indexer or a LoRA loader looks at; they let go of it soon.

    Raises:
        OSError: as os.replace; PermissionError where it stays locked.
    """
    for _ in range(RENAME_TRIES - 1):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(RENAME_WAIT_SECONDS)
    os.replace(source, target)


def sync_folder(folder: Path) -> None:
    """Make a rename durable. Windows has no fsync of folders and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_text(*parts: str) -> str:
    """Hex digest of strings, each delimited, so that ("ab", "c") and ("a", "bc") differ."""
    return sha256_texts(parts)


def sha256_texts(parts: Iterable[str]) -> str:
    """sha256_text of strings that come one by one."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")  # a name on disk may be no Unicode
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
