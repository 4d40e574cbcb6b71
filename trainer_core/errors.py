"""Errors that the user can fix.

A Problem is one error. UserError carries several at once: checks collect all problems instead of stopping at the first.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Problem:
    """An error in the user's input.

    Args:
        field: name of the field, or of the file if the error is not in a field.
        message: the actual value, the expected value and the fix, in one line.
        node: id of the node in the workflow, "" outside of a workflow.
        node_type: type of that node, such as "LoRATrainer".
    """

    field: str
    message: str
    node: str = ""
    node_type: str = ""

    @property
    def where(self) -> str:
        """Location, such as "node 5 (LoRATrainer).rank"."""
        if not self.node and not self.node_type:
            return self.field
        place = f"node {self.node} ({self.node_type})" if self.node else self.node_type
        if not self.field.isidentifier():  # the name of a file or folder, or ""
            return f"{place}: {self.field}" if self.field else place
        return f"{place}.{self.field}"

    def at(self, node: str, node_type: str) -> Problem:
        """Return the problem with a node assigned, unless it has one already."""
        return self if self.node or self.node_type else replace(self, node=node, node_type=node_type)

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class UserError(Exception):
    """One or more errors in the user's input, in reading order."""

    def __init__(self, problems: Iterable[Problem] | str):
        self.problems = (Problem("", problems),) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @classmethod
    def at(cls, field: str, message: str) -> UserError:
        """Return an error with a single problem."""
        return cls([Problem(field, message)])


class Cancelled(Exception):
    """The user stopped the run. Not an error: the progress so far is saved."""


def reason_of(error: Exception) -> str:
    """Return the first line of an error message, or the name of its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """Return all lines of an error message as one, or the name of its class if the message is empty."""
    return " | ".join(str(error).splitlines()) or type(error).__name__


LONGEST_NAME = 255  # characters of a name that similar ones are searched for
# ASCII and C1 control characters, marks that turn the direction of text, and halves of surrogate pairs.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def quoted(text: object) -> str:
    """Return a value in quotes, as repr does, but with the backslashes of a Windows path as they were typed."""
    return repr(str(text)).replace("\\\\", "\\")


def printable(text: str, lines: bool = False) -> str:
    """Return a text with its control characters as JSON writes them (\\u001b), so that it can't command a terminal.

    Args:
        text: the text, which may come from a file.
        lines: leave line breaks as they are.
    """
    return UNPRINTABLE.sub(lambda match: match[0] if lines and match[0] == "\n" else _escape(match[0]), text)


def encodable(text: str, stream: object) -> str:
    """Return a text whose characters the encoding of a stream can represent: others are escaped, as \\u732b.

    A Windows console, or a file that the output goes to, may have the encoding cp1252.
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:  # a stream with an encoding of its own
        return text.encode("ascii", "backslashreplace").decode("ascii")


def _escape(character: str) -> str:
    short = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return short.get(character, f"\\u{ord(character):04x}")


def nearest(name: str, names: Sequence[str], cutoff: float = 0.6) -> str:
    """Return '; did you mean X?' for the closest name, or '' if no name is close.

    Args:
        name: the name that the user gave.
        names: the valid names.
        cutoff: minimum similarity, 0 to 1. 1: equal except for upper and lower case.
    """
    if len(name) > LONGEST_NAME:  # the search takes the square of the length
        return ""
    matches = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=1, cutoff=cutoff)
    original = {n.lower(): n for n in names}
    return f"; did you mean {original[matches[0]]!r}?" if matches else ""
