"""Tables for millions of content keys: sorted, memory-mapped arrays. A dict of strings takes 300 bytes per key."""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Iterable

import numpy as np

DIGEST_BYTES = 16  # 128 bits: the chance that two of a million keys collide is 1e-27
SMALL_BYTES = 1 << 16  # an array up to this size stays in memory


def digests(keys: Iterable[str]) -> np.ndarray:
    """Return (keys, 2) uint64: the first 128 bits of each key.

    A key that is a SHA-256 in hex is used directly; any other key is hashed with SHA-256. Ascending rows are ascending
    hex keys.
    """
    raw = bytearray()
    sha256 = hashlib.sha256
    for key in keys:
        if len(key) == 64:
            raw += _digest(key)
        else:
            raw += sha256(key.encode("utf-8", "surrogatepass")).digest()[:DIGEST_BYTES]
    return np.array(np.frombuffer(raw, ">u8") if raw else (), dtype=np.uint64).reshape(-1, 2)


def _digest(key: str) -> bytes:
    """Return the digest of a key of 64 characters."""
    try:
        raw = bytes.fromhex(key)
        if len(raw) == 32:  # fromhex ignores whitespace
            return raw[:DIGEST_BYTES]
    except ValueError:
        pass
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:DIGEST_BYTES]


def argsort_rows(keys: np.ndarray) -> np.ndarray:
    """Return the indices that sort the rows of `digests` in ascending order. The sort is stable."""
    return np.lexsort((keys[:, 1], keys[:, 0]))


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """Return the ascending indices of the first occurrence of each row."""
    order = argsort_rows(keys)
    ordered = keys[order]
    is_new = np.ones(len(keys), dtype=bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return np.sort(order[is_new])


class Mapped:
    """A read-only copy of an array in an unnamed, memory-mapped file. The map has a handle of its own."""

    def __init__(self, array: np.ndarray):
        self.array = array = np.ascontiguousarray(array)
        if array.nbytes > SMALL_BYTES:
            with tempfile.TemporaryFile() as file:
                array.tofile(file)
                file.flush()
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.array = np.frombuffer(mapping, dtype=array.dtype).reshape(array.shape)


class DigestTable:
    """A table of one value per key.

    Args:
        keys: (rows, 2), see `digests`; duplicates are allowed.
        values: (rows,), of any dtype without objects.
    """

    def __init__(self, keys: np.ndarray, values: np.ndarray):
        order = argsort_rows(keys)
        self._high, self._low, self._values = Mapped(keys[order, 0]), Mapped(keys[order, 1]), Mapped(values[order])

    def __len__(self) -> int:
        return len(self.values)

    @property
    def keys(self) -> np.ndarray:
        """The keys, (rows, 2), ascending."""
        return np.stack((self._high.array, self._low.array), axis=1)

    @property
    def values(self) -> np.ndarray:
        """The values, in the order of the keys."""
        return self._values.array

    def has_duplicates(self) -> bool:
        """Return whether two rows have the same key."""
        high, low = self._high.array, self._low.array
        return bool(((high[1:] == high[:-1]) & (low[1:] == low[:-1])).any())

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return (keys,): the index in `values` of each key's first value, or -1 if the key is not in the table."""
        high, low, last = self._high.array, self._low.array, len(self) - 1
        if last < 0:
            return np.full(len(keys), -1)
        index = np.searchsorted(high, keys[:, 0])
        while True:
            clamped = np.minimum(index, last)
            matches_high = (index <= last) & (high[clamped] == keys[:, 0])
            is_collision = matches_high & (low[clamped] != keys[:, 1])  # the first 64 bits are equal, the others differ
            if not is_collision.any():
                return np.where(matches_high, clamped, -1)
            index[is_collision] += 1


class Numbers(DigestTable):
    """A table of the indices of some keys, in their order."""

    def __init__(self, keys: Iterable[str]):
        rows = digests(keys)
        super().__init__(rows, np.arange(len(rows), dtype=np.uint32))

    def of(self, key: str) -> int | None:
        """Return the index of a key, or None if it is not in the table."""
        (index,) = self.find(digests([key])).tolist()
        return int(self.values[index]) if index >= 0 else None
