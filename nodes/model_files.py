"""Model files that a person chose by name, for the nodes that load models."""

from __future__ import annotations

from collections.abc import Callable

from ..trainer_core.host import Host, collect
from ..trainer_core.problems import Problem

OWN_PART = "from flavour"  # the choice that names no file


def finder(host: Host, problems: list[Problem]) -> Callable[..., str]:
    """find(kind, name, field, none=OWN_PART) -> absolute path; "" for the choice `none`, and where nothing is found: a problem."""

    def find(kind: str, name: str, field: str, none: str = OWN_PART) -> str:
        path = None if name == none else collect(problems, host.paths.find_model, kind, name, field)
        return str(path) if path else ""

    return find
