"""Which values of a literal node can be recorded: JSON without NaN, in valid UTF-8, without deep nesting.

The fields of this package's nodes are checked by spec.py, and other nodes do not run here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import Problem, printable
from ..storage.bounded_files import Unusable, check_values
from .graph import Link, Node
from .resolve import LITERALS

SHOWN = 40  # characters of a name


def value_problems(node: Node) -> list[Problem]:
    """Return a problem for each value of a node that can't be written into the files of a run, which hold the workflow."""
    values = node.inputs.items() if node.type in LITERALS else ()
    problems = [
        Problem(printable(name[:SHOWN]), f"{fault}; change it").at(printable(node.id), node.type)
        for name, value in values
        if (fault := _fault_of(name, value))
    ]
    names = {"its id": node.id, "its type": node.type}
    problems += [
        Problem(
            "", f"{what} is not valid UTF-8 ({printable(text[:SHOWN])}); export the workflow again", printable(node.id)
        )
        for what, text in names.items()
        if not is_utf8(text)
    ]
    return problems


def _fault_of(name: str, value: Any) -> str:
    if not is_utf8(name):
        return "has a name that is not valid UTF-8"
    if isinstance(value, Link):
        return ""
    try:
        check_values(value)
    except Unusable as error:
        return str(error)
    return "" if all(map(is_utf8, _texts_in(value))) else "has a text that is not valid UTF-8"


def _texts_in(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value that check_values has accepted, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_in(item)


def is_utf8(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
