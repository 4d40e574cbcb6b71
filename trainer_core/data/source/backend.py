"""The interface of a dataset backend: where images and captions come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Entry:
    """One image as listed by the backend.

    Attributes:
        name: Path relative to the part's root, with forward slashes. It identifies the image in reports and seeds.
        stamp: Changes when the bytes change (for a file: size and modification time), so that an unchanged image is
            recognized without reading it.
    """

    name: str
    stamp: str


def stem(name: str) -> str:
    """Return the name without its extension, which an image shares with its caption, mask and reference."""
    return os.path.splitext(name)[0]


class Backend(Protocol):
    """A read-only source of images."""

    def entries(self) -> Sequence[Entry]:
        """Return every image, in an order that is the same on every system."""
        ...

    def read(self, name: str) -> bytes:
        """Return the image's bytes.

        Raises:
            OSError: The image can't be read.
        """
        ...

    def caption_text(self, name: str) -> tuple[str | None, str]:
        """Return the text of the image's caption file (None if there is none), and a stamp of that file."""
        ...

    def path(self, name: str) -> str:
        """Return the location of the image, for messages."""
        ...
