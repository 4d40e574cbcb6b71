"""A store of tensors by content key: safetensors shards that appear complete, or not at all, and are verified before they are read.

    <folder>/<sha256 of the shard's bytes>.safetensors

The name is the checksum, so that there is no manifest to lose. Two processes may write at once: each adds shards of its own, and equal
keys hold equal tensors. Deleting the folder loses nothing but time.

Where each tensor lies is in a mapped table of 32 bytes a key, so that a million of them take no memory.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from .atomic import remove_temporaries, sha256_of, write_atomic
from .digest_table import DigestTable, digests, first_of_each
from .safetensors_header import header_of

DAY = 86_400  # seconds
SHARD_BYTES = 64 << 20
PLACE = np.dtype([("begin", "<u8"), ("shard", "<u4"), ("kind", "<u4")])  # kind: number of a dtype and shape
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip  # safetensors' names -> torch's


class Store:
    """Tensors by key, kept on disk and memory-mapped when read.

    Args:
        folder: of the shards; made when the first is written.
        on_damage: told one line for each shard that had to be set aside.
    """

    def __init__(self, folder: Path, on_damage: Callable[[str], None] = lambda text: None):
        self.folder, self.on_damage = Path(folder), on_damage
        self._shards: list[str] = []  # names of files, by number
        self._kinds: list[tuple[torch.dtype, tuple[int, ...]]] = []
        self._number_of_kind: dict[tuple[torch.dtype, tuple[int, ...]], int] = {}
        self._tables: list[DigestTable] = []  # each at most half as long as the one before it
        self._verified: set[int] = set()
        self._mapped: dict[int, Tensor] = {}
        remove_temporaries(self.folder, older_than=DAY)
        found = sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []
        # Another process is writing those with a point in front, or was ended while it did.
        self._learn([path for path in found if not path.name.startswith(".")])

    def absent(self, keys: np.ndarray) -> np.ndarray:
        """Numbers of the keys that are not here, once each, ascending. Shards of the others are verified: each file once in a Store's life.

        Args:
            keys: (keys, 2), see digests.
        """
        while True:
            places, is_here = self._find(keys)
            unknown = set(np.unique(places["shard"][is_here]).tolist()) - self._verified
            for shard in sorted(unknown):
                self._verify(shard)
            if not unknown:
                lacking = np.flatnonzero(~is_here)
                return lacking[first_of_each(keys[lacking])]

    def missing(self, keys: Iterable[str]) -> list[str]:
        """`absent`, of a few keys by name."""
        names = list(keys)
        return [names[i] for i in self.absent(digests(names))]

    def get(self, key: str) -> Tensor:
        """The tensor of a key that is not missing. Memory-mapped: pages are read when touched; don't write to it."""
        places, is_here = self._find(digests([key]))
        if not is_here[0]:
            raise KeyError(key)
        begin, shard, kind = places[0].item()
        dtype, shape = self._kinds[kind]
        if shard not in self._mapped:
            path = self.folder / self._shards[shard]
            self._mapped[shard] = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        num_bytes = math.prod(shape) * dtype.itemsize
        return self._mapped[shard][begin : begin + num_bytes].view(dtype).view(shape)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard with these tensors; keys that are here already are skipped."""
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
        self._learn([path])

    def close(self) -> None:
        """Let go of the files (Windows can't delete a mapped one)."""
        self._mapped.clear()

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(PLACE of each key, whether it is here)."""
        places, is_here = np.zeros(len(keys), PLACE), np.zeros(len(keys), dtype=bool)
        for table in self._tables:
            rows = table.find(keys)
            found = (rows >= 0) & ~is_here
            places[found] = table.values[rows[found]]
            is_here |= found
        return places, is_here

    def _learn(self, paths: Sequence[Path]) -> None:
        """Take up shards: their keys become a table, and tables of like length become one."""
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
        """The shards' keys, one by one; a PLACE for each is added to the values."""
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
        if sha256_of(path) == path.stem:
            return
        self._mapped.pop(shard, None)
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        self._tables = [
            DigestTable(table.keys[table.values["shard"] != shard], table.values[table.values["shard"] != shard])
            for table in self._tables
        ]
        self.on_damage(
            f"cache file {path.name} is damaged; it was set aside as {aside.name} and its content is made again"
        )


def _tensors(path: Path) -> list[tuple[str, torch.dtype, tuple[int, ...], int]]:
    """(name, dtype, shape, first byte) by a shard's header; [] where it can't be read, so that its content is made again."""
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
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return []


def fill(
    store: Store,
    keys: np.ndarray,
    make: Callable[[np.ndarray], Iterable[Mapping[str, Tensor]]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Make what is missing and write it, a shard whenever one is full: after a kill all full shards are there.

    Args:
        keys: (keys, 2), see digests.
        make: from the numbers of the missing keys, batches of tensors in any order. Not called where nothing is missing.
    """
    absent = store.absent(keys)
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
    finally:  # a cancel keeps what is made already
        store.put(waiting)
