"""Settings as they are recorded: plain JSON values that travel, the same for the same run whatever fields were added since.

A class of settings says beside its fields what is particular about them:

    PATHS: ClassVar = ("folder",)                        of this machine: their last name is recorded
    LATER: ClassVar = (("masks", "unmasked_weight"),)    added since: recorded only where the first of them is not as it was
    UNRECORDED: ClassVar = ("roots",)                    found out on this machine
"""

from __future__ import annotations

import dataclasses
from typing import Any


def to_record(value: Any) -> Any:
    """Settings, or what they consist of, as JSON values (tuples stay tuples)."""
    if isinstance(value, tuple | list):
        return type(value)(to_record(item) for item in value)
    if not dataclasses.is_dataclass(value):
        return value
    paths, left_out = getattr(value, "PATHS", ()), set(getattr(value, "UNRECORDED", ()))
    for first, *others in getattr(value, "LATER", ()):
        if is_as_before(value, first):
            left_out |= {first, *others}
    return {
        field.name: last_of_path(getattr(value, field.name))
        if field.name in paths
        else to_record(getattr(value, field.name))
        for field in dataclasses.fields(value)
        if field.name not in left_out
    }


def is_as_before(settings: Any, name: str) -> bool:
    """Whether a field has its default, which does what was done before there was such a field."""
    default = next(field.default for field in dataclasses.fields(settings) if field.name == name)
    value = getattr(settings, name)
    return (value.strip() if isinstance(value, str) else value) == default


def last_of_path(text: str) -> str:
    """The last name of an absolute path; a hub id or a relative name (no slash in front, no drive) as it is."""
    is_absolute = text.startswith(("/", "\\")) or text[1:2] == ":"
    return text.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] if is_absolute else text
