"""Faults, worded for the person who can mend them.

A Problem is one fault. UserError carries all of them at once: checks collect, they do not stop at the first.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Problem:
    """One fault: where it is, what came, what is wanted, what to do.

    Args:
        field: field name, or the file's name where no field is at fault.
        message: what came, what is wanted, what to do; one line.
        node: id of the node in the workflow, "" outside of one.
        node_type: type of that node, such as "LoRATrainer".
    """

    field: str
    message: str
    node: str = ""
    node_type: str = ""

    @property
    def where(self) -> str:
        if not self.node and not self.node_type:
            return self.field
        place = f"node {self.node} ({self.node_type})" if self.node else self.node_type
        return f"{place}.{self.field}" if self.field else place

    def at(self, node: str, node_type: str) -> Problem:
        """The same fault, placed on a node, unless it is on one already."""
        return self if self.node or self.node_type else replace(self, node=node, node_type=node_type)

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class UserError(Exception):
    """The user's mistakes, all of them, in reading order."""

    def __init__(self, problems: Iterable[Problem] | str):
        self.problems = (Problem("", problems),) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @classmethod
    def at(cls, field: str, message: str) -> UserError:
        return cls([Problem(field, message)])


class Cancelled(Exception):
    """The user asked the run to end. Not an error: what was reached is kept."""


def reason_of(error: Exception) -> str:
    """The first line of an error, or its kind where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, names: Sequence[str], cutoff: float = 0.6) -> str:
    """'; did you mean X?' for the closest of the names, or '' where nothing is near. cutoff: 1 is equal but for case."""
    found = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=1, cutoff=cutoff)
    original = {n.lower(): n for n in names}
    return f"; did you mean {original[found[0]]!r}?" if found else ""
