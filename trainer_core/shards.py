"""A store of tensors by content key: safetensors shards that appear complete, or not at all, and are verified before they are read.

    <folder>/<sha256 of the shard's bytes>.safetensors

The name is the checksum, so that there is no manifest to lose. Two processes may write at once: each adds shards of its own, and equal
keys hold equal tensors. Deleting the folder loses nothing but time.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .files import remove_temporaries, sha256_of, write_atomic

DAY = 86_400  # seconds
SHARD_BYTES = 64 << 20


class Store:
    """Tensors by key, kept on disk and memory-mapped when read.

    Args:
        folder: of the shards; made when the first is written.
        on_damage: told one line for each shard that had to be set aside.
    """

    def __init__(self, folder: Path, on_damage: Callable[[str], None] = lambda text: None):
        self.folder, self.on_damage = Path(folder), on_damage
        self._places: dict[str, Path] = {}
        self._verified: set[Path] = set()
        self._handles: dict[Path, safe_open] = {}
        remove_temporaries(self.folder, older_than=DAY)
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []:
            if path.name.startswith("."):  # another process is writing it, or was ended while it did
                continue
            for key in _keys(path):
                self._places[key] = path

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that are not here, once each, in order. Shards of the others are verified: each file once in a Store's life."""
        found = list(dict.fromkeys(keys))
        for path in {self._places[key] for key in found if key in self._places}:
            self._verify(path)
        return [key for key in found if key not in self._places]

    def get(self, key: str) -> Tensor:
        """The tensor of a key that is not missing. Memory-mapped: pages are read when touched; don't write to it."""
        path = self._places[key]
        if path not in self._handles:
            self._handles[path] = safe_open(path, framework="pt", device="cpu")
        return self._handles[path].get_tensor(key)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard with these tensors; keys that are here already are skipped."""
        fresh = {key: value.detach().cpu().contiguous() for key, value in tensors.items() if key not in self._places}
        if not fresh:
            return
        data = save(dict(sorted(fresh.items())))
        path = self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        write_atomic(path, data)
        self._verified.add(path)
        self._places.update(dict.fromkeys(fresh, path))

    def close(self) -> None:
        """Let go of the files (Windows can't delete a mapped one)."""
        self._handles.clear()

    def _verify(self, path: Path) -> None:
        if path in self._verified:
            return
        if sha256_of(path) == path.stem:
            self._verified.add(path)
            return
        self._handles.pop(path, None)
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        self._places = {key: place for key, place in self._places.items() if place != path}
        self.on_damage(
            f"cache file {path.name} is damaged; it was set aside as {aside.name} and its content is made again"
        )


def _keys(path: Path) -> list[str]:
    """Keys in a shard's header; [] where it can't be read, so that its content is made again."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > path.stat().st_size:
                return []
            return [key for key in json.loads(stream.read(length)) if key != "__metadata__"]
    except (OSError, struct.error, ValueError, TypeError):
        return []


def fill(
    store: Store,
    keys: Iterable[str],
    make: Callable[[list[str]], Iterable[Mapping[str, Tensor]]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Make what is missing and write it, a shard whenever one is full: after a kill all full shards are there.

    Args:
        make: from the missing keys, batches of tensors in any order. Not called where nothing is missing.
    """
    absent = store.missing(keys)
    if not absent:
        return
    waiting: dict[str, Tensor] = {}
    size = 0
    try:
        for batch in make(absent):
            waiting.update(batch)
            size += sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
            if size >= shard_bytes:
                store.put(waiting)
                waiting, size = {}, 0
    finally:  # a cancel keeps what is made already
        store.put(waiting)
