"""The interface of a dataset backend: where images and captions come from."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

# Control characters, line separators and lone surrogates: they break a terminal, a log or its encoding.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MAX_LISTED = 10_000  # names in each list of the report; the rest is only counted


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


def same_name(name: str) -> str:
    """Return a name in the composed form of Unicode, which is equal for all spellings of a name.

    macOS and archives from there write é as e and an accent.
    """
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def printable_name(name: str) -> str:
    """Return a name as it can be printed and encoded.

    Control characters and bytes that are not UTF-8 are escaped, such as `\\xea` for a byte of another code page.
    """
    return UNPRINTABLE.sub(_escape, name)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as Python names it
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


@dataclass
class LeftOut:
    """What a backend found beside its images.

    Attributes:
        unreadable: (location, reason) of files that hold an image, or should, and can't be read.
        num_unreadable: Number of these files; at most MAX_LISTED are listed.
        by_rule: Reason why files are no part of the dataset -> location of the first, and number of files.
    """

    unreadable: list[tuple[str, str]] = field(default_factory=list)
    num_unreadable: int = 0
    by_rule: dict[str, str] = field(default_factory=dict)
    num_by_rule: Counter[str] = field(default_factory=Counter)

    def add_unreadable(self, location: str, reason: str) -> None:
        """Add a file that can't be read."""
        self.num_unreadable += 1
        if len(self.unreadable) < MAX_LISTED:
            self.unreadable.append((location, reason))

    def add_by_rule(self, location: str, reason: str, count: int = 1) -> None:
        """Add files that are no part of the dataset."""
        self.by_rule[reason] = min(location, self.by_rule.get(reason, location))  # folders are listed in any order
        self.num_by_rule[reason] += count


class Backend(Protocol):
    """A read-only source of images.

    Attributes:
        left_out: What `entries` found beside the images.
        encodings: Number of captions that are not Unicode, by the encoding in which they were read.
        has_rows: Whether each image has a row of named values, which `file_beside` returns as a .json file.
    """

    left_out: LeftOut
    encodings: Counter[str]
    has_rows: bool

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
        """Return the text of the image's caption file (None if there is none), and a stamp of that file.

        Raises:
            OSError: The file can't be read.
            UnreadableText: It can't be decoded.
        """
        ...

    def file_beside(self, name: str, suffix: str) -> bytes | None:
        """Return the file beside an image that has its name and this ending; None if there is none.

        Raises:
            OSError: The file can't be read.
            UnreadableText: It is too large, or not a regular file.
        """
        ...

    def path(self, name: str) -> str:
        """Return the location of the image in printable form, for messages."""
        ...


def left_out_report(backends: Sequence[Backend]) -> list[dict[str, Any]]:
    """Return what is no part of the dataset though it lies in its folders: why, how many images, and one of them."""
    return [
        {"what": what, "images": backend.left_out.num_by_rule[what], "example": example}
        for backend in backends
        for what, example in backend.left_out.by_rule.items()
    ]


def describe_left_out(entry: Mapping[str, Any]) -> str:
    """Return an entry of `left_out_report` as a line of the log."""
    return f"left out {entry['images']} images: {entry['what']}, such as {entry['example']}"
