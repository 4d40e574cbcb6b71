"""A store of tensors by content key, in safetensors shards that are written atomically and verified before use.

    <folder>/<sha256 of the shard's bytes>.safetensors

The file name is the checksum, so there is no manifest to lose. Two processes may write at once: each adds its own
shards, and equal keys hold equal tensors. Deleting the folder only costs time.

The location of each tensor is in a memory-mapped table of 32 bytes per key, so that a million of them take no memory.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from .atomic import remove_temporaries, rename, sha256_of, write_atomic
from .digest_table import DigestTable, digests, first_of_each
from .safetensors_header import header_of

DAY = 86_400  # seconds
SHARD_BYTES = 64 << 20
PLACE = np.dtype([("begin", "<u8"), ("shard", "<u4"), ("kind", "<u4")])  # kind: index of a dtype and shape
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip  # name in safetensors -> name in torch


class Workers(Protocol):
    """See distributed/ranks.py: Ranks."""

    def from_leader(self, compute: Callable[[], list[int]]) -> list[int]: ...

    def together(self, compute: Callable[[], None]) -> list[None]: ...


class Store:
    """Tensors by key, stored on disk and memory-mapped for reading.

    Args:
        folder: Folder of the shards, created with the first of them.
        on_damage: Called with a line of text for each damaged shard that is set aside.
    """

    def __init__(self, folder: Path, on_damage: Callable[[str], None] = lambda text: None):
        self.folder, self.on_damage = Path(folder), on_damage
        self._shards: list[str] = []  # file names
        self._kinds: list[tuple[torch.dtype, tuple[int, ...]]] = []
        self._number_of_kind: dict[tuple[torch.dtype, tuple[int, ...]], int] = {}
        self._tables: list[DigestTable] = []  # each at most half as long as the previous one
        self._verified: set[int] = set()
        self._mapped: dict[int, Tensor] = {}
        remove_temporaries(self.folder, older_than=DAY)
        self._read_folder()

    def read_again(self) -> None:
        """Find the shards that other processes have written since, and forget those that they have set aside."""
        verified = {self._shards[shard] for shard in self._verified}
        self._shards, self._tables, self._mapped = [], [], {}
        self._read_folder()
        self._verified = {number for number, name in enumerate(self._shards) if name in verified}

    def _read_folder(self) -> None:
        paths = sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []
        # Files that start with a dot are being written by another process, or by one that was killed.
        self._add_shards([path for path in paths if not path.name.startswith(".")])

    def absent(self, keys: np.ndarray) -> np.ndarray:
        """Return the ascending indices of the keys that are not in the store, without duplicates.

        The shards of the other keys are verified, each file once in the lifetime of a Store.

        Args:
            keys: (keys, 2), see `digests`.
        """
        while True:
            locations, is_here = self._find(keys)
            unverified = set(np.unique(locations["shard"][is_here]).tolist()) - self._verified
            for shard in sorted(unverified):
                self._verify(shard)
            if not unverified:
                missing = np.flatnonzero(~is_here)
                return missing[first_of_each(keys[missing])]

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return those of a few keys that are not in the store."""
        names = list(keys)
        return [names[i] for i in self.absent(digests(names))]

    def get(self, key: str) -> Tensor:
        """Return the tensor of a key. It is memory-mapped: pages are read on access. Do not write to it.

        Raises:
            KeyError: The key is not in the store.
        """
        locations, is_here = self._find(digests([key]))
        if not is_here[0]:
            raise KeyError(key)
        begin, shard, kind = locations[0].item()
        dtype, shape = self._kinds[kind]
        if shard not in self._mapped:
            path = self.folder / self._shards[shard]
            self._mapped[shard] = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        num_bytes = math.prod(shape) * dtype.itemsize
        return self._mapped[shard][begin : begin + num_bytes].view(dtype).view(shape)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Write these tensors as one shard. Keys that are already stored are skipped."""
        names = list(tensors)
        _, is_here = self._find(digests(names))
        fresh = {
            name: tensors[name].detach().cpu().contiguous()
            for name, here in zip(names, is_here, strict=True)
            if not here
        }
        if not fresh:
            return
        data = save(dict(sorted(fresh.items())))
        path = self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        write_atomic(path, data)
        self._verified.add(len(self._shards))
        self._add_shards([path])

    def close(self) -> None:
        """Release the memory-mapped files. Windows can't delete a file while it is mapped."""
        self._mapped.clear()

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the PLACE of each key, and whether it is in the store."""
        locations, is_here = np.zeros(len(keys), PLACE), np.zeros(len(keys), dtype=bool)
        for table in self._tables:
            rows = table.find(keys)
            is_new = (rows >= 0) & ~is_here
            locations[is_new] = table.values[rows[is_new]]
            is_here |= is_new
        return locations, is_here

    def _add_shards(self, paths: Sequence[Path]) -> None:
        """Add shards to the index.

        Their keys become a table, which is merged with the previous tables that are not at least twice as long.
        """
        values = bytearray()
        keys = digests(self._keys_of(paths, values))
        if not len(keys):
            return
        self._tables.append(DigestTable(keys, np.frombuffer(values, PLACE)))
        while len(self._tables) > 1 and len(self._tables[-2]) < 2 * len(self._tables[-1]):
            one, other = self._tables.pop(-2), self._tables.pop()
            both = np.concatenate((one.values, other.values))
            self._tables.append(DigestTable(np.concatenate((one.keys, other.keys)), both))

    def _keys_of(self, paths: Sequence[Path], values: bytearray) -> Iterator[str]:
        """Yield the keys of the shards, and append a PLACE for each of them to `values`."""
        for path in paths:
            for name, dtype, shape, begin in _tensors(path):
                kind = self._number_of_kind.setdefault((dtype, shape), len(self._kinds))
                if kind == len(self._kinds):
                    self._kinds.append((dtype, shape))
                values += struct.pack("<QII", begin, len(self._shards), kind)
                yield name
            self._shards.append(path.name)

    def _verify(self, shard: int) -> None:
        path = self.folder / self._shards[shard]
        self._verified.add(shard)
        aside = path.with_suffix(".damaged")
        try:
            if sha256_of(path) == path.stem:
                return
            self._mapped.pop(shard, None)
            rename(path, aside)
            text = (
                f"cache file {path.name} is damaged; it was renamed to {aside.name} and its content will be recomputed"
            )
        except FileNotFoundError:  # another process has set it aside, or the cache was emptied
            text = ""
        self._tables = [
            DigestTable(table.keys[table.values["shard"] != shard], table.values[table.values["shard"] != shard])
            for table in self._tables
        ]
        if text:
            self.on_damage(text)


def _tensors(path: Path) -> list[tuple[str, torch.dtype, tuple[int, ...], int]]:
    """Return (name, dtype, shape, offset) of each tensor in a shard.

    The result is [] if the header can't be read, so that the content is recomputed.
    """
    try:
        header, start = header_of(path)
        return [
            (
                name,
                getattr(torch, DTYPES[about["dtype"]]),
                tuple(map(int, about["shape"])),
                start + about["data_offsets"][0],
            )
            for name, about in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError):  # KeyError: a dtype that is never stored here
        return []


def fill(
    store: Store,
    keys: np.ndarray,
    make: Callable[[np.ndarray], Iterable[Mapping[str, Tensor]]],
    shard_bytes: int = SHARD_BYTES,
    workers: Workers | None = None,
) -> None:
    """Compute the tensors that are missing and write them, one shard at a time.

    If the process is killed, all full shards remain. Several processes that fill a store together call this at once;
    each finds the tensors of all of them in its store then.

    Args:
        store: The store.
        keys: (keys, 2), see `digests`.
        make: From the indices of the missing keys, yields batches of tensors in any order. Not called if none is
            missing.
        shard_bytes: Size at which a shard is written.
        workers: The processes that fill the store together. `make` computes this one's share.
    """
    if workers is None:
        _fill(store, store.absent(keys), make, shard_bytes)
        return
    absent = np.array(workers.from_leader(lambda: store.absent(keys).tolist()), dtype=np.int64)
    workers.together(lambda: _fill(store, absent, make, shard_bytes))
    store.read_again()


def _fill(
    store: Store, absent: np.ndarray, make: Callable[[np.ndarray], Iterable[Mapping[str, Tensor]]], shard_bytes: int
) -> None:
    if not len(absent):
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
    finally:  # after a cancel too, to keep what has been computed
        store.put(waiting)
