"""Digests that identify weights by content, regardless of file names and paths.

Every byte of a file counts. A large file is read once: its digest is remembered in the cache folder, by path, size,
time of change and inode.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...host import Host, PhaseProgress, PhaseStarted
from ...storage.atomic import sha256_text, write_json
from ...storage.model_header import SETTLED_SECONDS

SMALL_BYTES = 8 << 20  # a file of at most this size is read each time
CHUNK_BYTES = 16 << 20
READERS = max(1, min(8, os.cpu_count() or 1))  # hashing 18 GB takes a CPU 12 to 40 s, and a disk as long
SAMPLE_BYTES, NUM_SAMPLES = 1 << 20, 8
MEMORY = "weight-digests.json"

Digest = Callable[[Path], str]
_remembered: dict[tuple[str, ...], str] = {}  # of this process


def identity_of(files: Iterable[Path], *rules: str) -> str:
    """Return a hex digest of the files' contents and of rules, such as a length. Order and paths don't matter."""
    return sha256_text(*sorted(content_digest(file) for file in files), *rules)


def content_digest(file: Path) -> str:
    """Return a digest of a file's content. See remembering and sampling."""
    try:
        return _digest.get()(file)
    except OSError as error:
        raise UserError.at(file.name, f"can't be read: {error.strerror or error} ({file})") from error


@contextmanager
def remembering(host: Host) -> Iterator[None]:
    """Within the context, digests of large files are read from the host's cache folder and written to it.

    The host gets progress. It may raise Cancelled between two parts of a file.
    """
    path = host.paths.cache / MEMORY

    def digest(file: Path) -> str:
        key = _key_of(file)
        if key not in _remembered:
            _remembered.update(_read(path))
        if key in _remembered:
            return _remembered[key]
        value = _digest_all(file, host)
        if _is_settled(file, key):
            _remembered[key] = value
            _write(path)
        return value

    token = _digest.set(lambda file: _digest_all(file) if file.stat().st_size <= SMALL_BYTES else digest(file))
    try:
        yield
    finally:
        _digest.reset(token)


@contextmanager
def sampling() -> Iterator[None]:
    """Within the context, digests are of samples of a large file, as runs were identified until November 2026."""
    token = _digest.set(_digest_samples)
    try:
        yield
    finally:
        _digest.reset(token)


def _digest_in_process(file: Path) -> str:
    if file.stat().st_size <= SMALL_BYTES:
        return _digest_all(file)
    key = _key_of(file)
    if key not in _remembered:
        value = _digest_all(file)
        if not _is_settled(file, key):
            return value
        _remembered[key] = value
    return _remembered[key]


_digest: ContextVar[Digest] = ContextVar("digest of a file", default=_digest_in_process)


def _digest_all(file: Path, host: Host | None = None) -> str:
    """Return the digest of a file's size and content. A large one is hashed in parts, by several threads."""
    size = file.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    if size <= SMALL_BYTES:
        digest.update(file.read_bytes())
        return digest.hexdigest()
    starts = range(0, size, CHUNK_BYTES)
    if host:
        host.emit(PhaseStarted("identify", len(starts) * CHUNK_BYTES >> 20, "MiB"))
    with ThreadPoolExecutor(READERS) as pool:
        parts = pool.map(lambda start: _digest_part(file, start), starts)
        try:
            for done, part in enumerate(parts, 1):
                digest.update(part)
                if host:
                    host.check_cancelled()
                    host.emit(PhaseProgress("identify", done * CHUNK_BYTES >> 20, len(starts) * CHUNK_BYTES >> 20))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return digest.hexdigest()


def _digest_part(file: Path, start: int) -> bytes:
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        digest, left = hashlib.sha256(), CHUNK_BYTES
        while left and (data := stream.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
    return digest.digest()


def _digest_samples(file: Path) -> str:
    """Return a digest of a file's size and of eight 1 MiB samples (first, last, six between), or of all up to 8 MiB."""
    size = file.stat().st_size
    if size <= SAMPLE_BYTES * NUM_SAMPLES:
        return _digest_all(file)
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with file.open("rb") as stream:
        for i in range(NUM_SAMPLES):
            stream.seek((size - SAMPLE_BYTES) * i // (NUM_SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _key_of(file: Path) -> tuple[str, ...]:
    """Return what changes when a file changes: path, size, time of change, and inode (0 where there is none)."""
    facts = file.stat()
    return str(file.resolve()), str(facts.st_size), str(facts.st_mtime_ns), str(facts.st_ino)


def _is_settled(file: Path, key: tuple[str, ...]) -> bool:
    """Return whether the file did not change while it was read, and is not about to."""
    return _key_of(file) == key and time.time() - int(key[2]) / 1e9 > SETTLED_SECONDS


def _read(path: Path) -> dict[tuple[str, ...], str]:
    try:
        rows: Any = json.loads(path.read_text(encoding="utf-8"))
        return {tuple(map(str, row[:-1])): str(row[-1]) for row in rows if len(row) == 5}
    except (OSError, ValueError, TypeError, KeyError):  # missing or damaged: the files are read again
        return {}


def _write(path: Path) -> None:
    """Write all digests, with those that other processes have added. The newest of a path stays."""
    rows = {key[0]: [*key, value] for key, value in {**_read(path), **_remembered}.items()}
    try:
        write_json(path, [*rows.values()])
    except OSError:  # a full or read-only disk: the file is read again next time
        return
