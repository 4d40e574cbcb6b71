"""Write files atomically, so that a reader never sees a partial file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HASH_CHUNK_BYTES = 1 << 20
TEMPORARY = ".tmp-"  # prefix of temporary files
DAMAGED = "damaged-"  # prefix of damaged files and folders that were set aside
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
RENAME_TRIES, RENAME_WAIT_SECONDS = 6, 0.2


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write to a temporary file next to the target, fsync, and rename.

    A reader sees either the old file or the new one.

    Raises:
        OSError: The disk is full or read-only, or the name is too long. The old file is unchanged and no temporary file
            is left behind.
    """
    raw = data.encode("utf-8") if isinstance(data, str) else data
    replace_atomic(path, lambda temporary: temporary.write_bytes(raw))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented by two spaces and with a final newline.

    NaN raises ValueError, because it is not valid JSON.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, text.encode("utf-8", "backslashreplace"))  # lone surrogates, as JSON escapes them


def fault_of(folder: Path) -> str:
    """Return why a folder is not writable, or "" if it is. The folder is created if it does not exist."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def replace_atomic(path: Path, write: Callable[[Path], Any], staging: Path | None = None) -> None:
    """Let `write` fill a temporary file, then fsync it and rename it over the target.

    Args:
        path: The target.
        write: Writes the file at the path it is given.
        staging: Existing folder for the temporary file, where a killed process may leave it behind. It is used if it is
            on the same file system as the target; otherwise the target's folder is used.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    near = staging and staging.stat().st_dev == path.parent.stat().st_dev
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=staging if near else path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with as_os_errors(path):
            write(temporary)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)  # mkstemp creates 0600, but other users of the machine read LoRAs too
        rename(temporary, path)
    finally:
        with suppress(OSError):  # a program that has it open too; the next run removes it
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def as_os_errors(path: Path) -> Iterator[None]:
    """Raise errors of the safetensors package, which wrap those of the system in a text, as the OSError that they are."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error), str(path)) from error


def remove_temporaries(folder: Path, older_than: float = 0.0) -> None:
    """Delete the temporary files that killed processes left in a folder and its subfolders.

    Args:
        folder: Searched recursively.
        older_than: Minimum age in seconds, for folders that other processes may be writing to.
    """
    for path in folder.rglob(f"{TEMPORARY}*"):
        try:
            if path.is_file() and time.time() - path.stat().st_mtime >= older_than:
                path.unlink()
        except OSError:  # another process deleted it first, or has it open
            continue


def rename(source: Path, target: Path) -> None:
    """Call os.replace, and retry for a second if another program has the source or target open.

    Windows refuses to rename a file that a virus scanner, an indexer or a LoRA loader has open. They close it soon.

    Raises:
        OSError: As for os.replace; PermissionError with the target's path if the file stays locked.
    """
    for _ in range(RENAME_TRIES - 1):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(RENAME_WAIT_SECONDS)
    try:
        os.replace(source, target)
    except PermissionError as error:  # names the source, which is a temporary file
        reason = f"{error.strerror or 'Permission denied'}; close other programs that have it open"
        raise PermissionError(error.errno, reason, str(target)) from error


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to damaged-NAME, in place of an earlier one. Return its new path."""
    renamed = path.with_name(f"{DAMAGED}{path.name}")
    if renamed.is_dir() and not renamed.is_symlink():
        shutil.rmtree(renamed, ignore_errors=True)
    elif path.is_dir():
        renamed.unlink(missing_ok=True)
    rename(path, renamed)
    return renamed


def sync_folder(folder: Path) -> None:
    """Make a rename durable, where the file system can: Windows opens no folders, and does not need it."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # network shares and FUSE: a folder can be opened, but not synced
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Return the hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_text(*parts: str) -> str:
    """Return the hex digest of strings. Each is delimited, so that ("ab", "c") and ("a", "bc") differ."""
    return sha256_texts(parts)


def sha256_texts(parts: Iterable[str]) -> str:
    """Return the same as sha256_text, for an iterable of strings."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")  # a file name may not be valid Unicode
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
