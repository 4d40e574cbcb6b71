"""A base class for sequences that create each item on access."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

Item = TypeVar("Item")


class LazySequence(Sequence[Item]):
    """A sequence that behaves like a tuple."""

    @abstractmethod
    def _item(self, index: int) -> Item:
        """Return the item at an index from 0 to len - 1."""

    def _part(self, indices: range) -> Sequence[Item]:
        """Return the result of a slice."""
        return [self._item(index) for index in indices]

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return self._part(range(*index.indices(len(self))))
        positive = index + len(self) if index < 0 else index
        if not 0 <= positive < len(self):
            raise IndexError(index)
        return self._item(positive)
