"""Sequences that hold no items: each is made when it is asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

Item = TypeVar("Item")


class LazySequence(Sequence[Item]):
    """Reads like a tuple."""

    @abstractmethod
    def _item(self, place: int) -> Item:
        """place: from 0 to len - 1."""

    def _part(self, places: range) -> Sequence[Item]:
        """What a slice gives."""
        return [self._item(place) for place in places]

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return self._part(range(*index.indices(len(self))))
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        return self._item(place)
