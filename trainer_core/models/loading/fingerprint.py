"""Digests that identify weights by content, regardless of file names and paths."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ...errors import UserError
from ...storage.atomic import sha256_text

# Hashing 18 GB takes a minute. The header names every tensor, and fine-tunes differ in every sampled megabyte.
SAMPLE_BYTES = 1 << 20
NUM_SAMPLES = 8


def identity_of(files: Iterable[Path], *rules: str) -> str:
    """Return a hex digest of the files' contents and of rules, such as a length. Order and paths don't matter."""
    return sha256_text(*sorted(content_digest(file) for file in files), *rules)


def content_digest(file: Path) -> str:
    """Return a digest of a file's size and of eight 1 MiB samples (first, last, six between), or of all up to 8 MiB."""
    digest = hashlib.sha256()
    try:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            if size <= SAMPLE_BYTES * NUM_SAMPLES:
                digest.update(stream.read())
            else:
                for i in range(NUM_SAMPLES):
                    stream.seek((size - SAMPLE_BYTES) * i // (NUM_SAMPLES - 1))
                    digest.update(stream.read(SAMPLE_BYTES))
    except OSError as error:
        raise UserError.at(file.name, f"can't be read: {error.strerror or error} ({file})") from error
    return digest.hexdigest()
