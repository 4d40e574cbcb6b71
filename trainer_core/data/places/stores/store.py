"""The interface of a store: a place with named files that are listed and downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Protocol

from ....errors import UserError, printable


class Temporary(Exception):
    """A request failed in a way that another try may mend. str() is the reason, for the user.

    Attributes:
        wait: Seconds that the server asks to wait; 0 if it does not say.
    """

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class Missing(OSError):
    """A single file can't be had, while the store works. str() is the reason, for the user."""


class Changed(Exception):
    """A file is not what it was when its download began, so what is there of it can't be continued."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a store.

    Attributes:
        name: Path below the place, with forward slashes.
        size: In bytes.
        stamp: Changes when its bytes change.
    """

    name: str
    size: int
    stamp: str


class Store(Protocol):
    """A place with files.

    Attributes:
        place: Its address, for messages.
    """

    place: str

    def page(self, token: str) -> tuple[list[StoredFile], str]:
        """Return some of the files, in any order, and the token of the next page; "" after the last one.

        Args:
            token: That of the page; "" for the first.
        Raises:
            Temporary: Try again.
            UserError: The store can't be used, such as with wrong keys.
        """
        ...

    def download(self, file: StoredFile, target: IO[bytes], start: int) -> None:
        """Append the bytes of a file from `start` on to a stream.

        Raises:
            Temporary: Try again, from the end of what was written.
            Changed: The file was replaced.
            Missing: It can't be had.
            UserError: The store can't be used any more.
        """
        ...


def store_fault(place: str, reason: str, advice: str) -> UserError:
    """Return the error about a store that can't be used."""
    return UserError.at("folder", f"{printable(place)}: {printable(reason)}; {advice}")
