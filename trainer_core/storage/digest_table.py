"""Tables by content key, for millions of keys: sorted arrays in files that the system maps, where a dict of strings takes 300 bytes a key."""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Iterable

import numpy as np

DIGEST_BYTES = 16  # 128 bits: among a million keys two are the same with a chance of 1e-27
SMALL_BYTES = 1 << 16  # an array up to this size stays in memory


def digests(keys: Iterable[str]) -> np.ndarray:
    """(keys, 2) uint64: the first 128 bits of each key that is a SHA-256 in hex, of its SHA-256 otherwise.

    Rows in ascending order are hex keys in ascending order.
    """
    raw = bytearray()
    for key in keys:
        raw += _digest(key)
    return np.array(np.frombuffer(raw, ">u8") if raw else (), dtype=np.uint64).reshape(-1, 2)


def _digest(key: str) -> bytes:
    if len(key) == 64:
        try:
            raw = bytes.fromhex(key)
            if len(raw) == 32:  # it passes over blanks
                return raw[:DIGEST_BYTES]
        except ValueError:
            pass
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:DIGEST_BYTES]


def argsort_rows(keys: np.ndarray) -> np.ndarray:
    """Numbers of the rows of `digests` in ascending order; equal ones stay in theirs."""
    return np.lexsort((keys[:, 1], keys[:, 0]))


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """Numbers of the rows that have no equal one before them, ascending."""
    order = argsort_rows(keys)
    ordered = keys[order]
    is_new = np.ones(len(keys), dtype=bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return np.sort(order[is_new])


class Mapped:
    """A copy of an array, in a file without a name that the system maps; read only, and open as long as this lives."""

    def __init__(self, array: np.ndarray):
        self.file = None
        self.array = array = np.ascontiguousarray(array)
        if array.nbytes > SMALL_BYTES:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115
            array.tofile(self.file)
            self.file.flush()
            mapping = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
            self.array = np.frombuffer(mapping, dtype=array.dtype).reshape(array.shape)


class DigestTable:
    """A value for each key.

    Args:
        keys: (rows, 2), see digests; a key may be there more than once.
        values: (rows,), of any dtype without objects.
    """

    def __init__(self, keys: np.ndarray, values: np.ndarray):
        order = argsort_rows(keys)
        self._high, self._low, self._values = Mapped(keys[order, 0]), Mapped(keys[order, 1]), Mapped(values[order])

    def __len__(self) -> int:
        return len(self.values)

    @property
    def keys(self) -> np.ndarray:
        """(rows, 2), ascending."""
        return np.stack((self._high.array, self._low.array), axis=1)

    @property
    def values(self) -> np.ndarray:
        """In the order of the keys."""
        return self._values.array

    def find(self, keys: np.ndarray) -> np.ndarray:
        """(keys,): the first place of each key in `values`; -1 where it is not there."""
        high, low, last = self._high.array, self._low.array, len(self) - 1
        if last < 0:
            return np.full(len(keys), -1)
        place = np.searchsorted(high, keys[:, 0])
        while True:
            at = np.minimum(place, last)
            is_near = (place <= last) & (high[at] == keys[:, 0])
            is_other = is_near & (low[at] != keys[:, 1])  # the same 64 bits, not the same 128
            if not is_other.any():
                return np.where(is_near, at, -1)
            place[is_other] += 1


class Numbers(DigestTable):
    """The number of each of some keys, in their order."""

    def __init__(self, keys: Iterable[str]):
        found = digests(keys)
        super().__init__(found, np.arange(len(found), dtype=np.uint32))

    def of(self, key: str) -> int | None:
        """None for a key that is not among them."""
        (place,) = self.find(digests([key])).tolist()
        return int(self.values[place]) if place >= 0 else None
