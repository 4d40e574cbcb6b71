"""A digest that names weights, whatever they are called and wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ...errors import UserError
from ...storage.atomic import sha256_text

# Hashing 18 GB takes a minute; the header names every tensor, and finetunes differ in every sampled megabyte.
SAMPLE_BYTES = 1 << 20
NUM_SAMPLES = 8


def identity_of(files: Iterable[Path], *rules: str) -> str:
    """Hex digest of the files' contents and of rules, such as a length; order and paths don't count."""
    return sha256_text(*sorted(content_digest(file) for file in files), *rules)


def content_digest(file: Path) -> str:
    """Digest of a file's size, of its first and last MiB and of six between; of the whole file up to 8 MiB."""
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
