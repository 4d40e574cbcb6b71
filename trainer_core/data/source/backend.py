"""What a dataset backend brings: where images and their captions come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Entry:
    """One image as the backend lists it.

    Args:
        name: relative to the part's root, with forward slashes; stands for the image in reports and seeds.
        stamp: changes when the bytes change (size and time for a file); lets an unchanged image be recognised without reading it.
    """

    name: str
    stamp: str


def stem(name: str) -> str:
    """The name without its ending: what a picture shares with what belongs to it."""
    return os.path.splitext(name)[0]


class Backend(Protocol):
    """A source of images. Reads only."""

    def entries(self) -> Sequence[Entry]:
        """Every image, in an order that is the same on every system."""
        ...

    def read(self, name: str) -> bytes:
        """The image's bytes. Raises OSError."""
        ...

    def caption_text(self, name: str) -> tuple[str | None, str]:
        """The text of the caption file beside the image (None: there is none), and a stamp of it."""
        ...

    def path(self, name: str) -> str:
        """Where a person finds the image."""
        ...
