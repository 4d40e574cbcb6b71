"""Records of settings: plain JSON values without paths of this machine, which stay equal when fields are added later.

A settings class declares how its fields are recorded:

    # Paths: only the last component is recorded.
    PATHS: ClassVar[tuple[str, ...]] = ("folder",)
    # Later additions: recorded only if the first is not the default.
    LATER: ClassVar[tuple[tuple[str, ...], ...]] = (("masks", "unmasked_weight"),)
    # Resolved on this machine: never recorded.
    UNRECORDED: ClassVar[tuple[str, ...]] = ("roots",)

KEY and STORED keep the names of classes and fields in files when the code is renamed: storage/stored_names.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..storage.stored_names import is_as_before, stored_fields


def to_record(value: Any) -> Any:
    """Return settings, or a value within them, as JSON values (tuples stay tuples)."""
    if isinstance(value, tuple | list):
        return type(value)(to_record(item) for item in value)
    if not dataclasses.is_dataclass(value):
        return value
    paths, skipped = getattr(value, "PATHS", ()), set(getattr(value, "UNRECORDED", ()))
    for first, *others in getattr(value, "LATER", ()):
        if is_as_before(value, first):
            skipped |= {first, *others}
    return {
        stored: last_of_path(getattr(value, name)) if name in paths else to_record(getattr(value, name))
        for name, stored in stored_fields(type(value)).items()
        if name not in skipped
    }


def last_of_path(text: str) -> str:
    """Return the last component of an absolute path, and a repository id or a relative name unchanged.

    A text is an absolute path if it starts with a slash, a backslash or a drive letter.
    """
    is_absolute = text.startswith(("/", "\\")) or text[1:2] == ":"
    return text.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] if is_absolute else text
