"""Records of settings: plain JSON values without paths of this machine, which stay equal when fields are added later.

A settings class declares how its fields are recorded:

    # Paths: only the last component is recorded.
    PATHS: ClassVar[tuple[str, ...]] = ("folder",)
    # Later additions: recorded only if the first is not the default.
    LATER: ClassVar[tuple[tuple[str, ...], ...]] = (("masks", "unmasked_weight"),)
    # Resolved on this machine: never recorded.
    UNRECORDED: ClassVar[tuple[str, ...]] = ("roots",)

and, if keys of caches are computed from it, the text that they hash (see key_text):

    KEY: ClassVar[tuple[str, ...]] = ("Placement", "bucket", "resize", "crop")
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any


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
        field.name: last_of_path(getattr(value, field.name))
        if field.name in paths
        else to_record(getattr(value, field.name))
        for field in dataclasses.fields(value)
        if field.name not in skipped
    }


def is_as_before(settings: Any, name: str) -> bool:
    """Return whether a field has its default, with which a run does the same as before the field was added."""
    default = next(field.default for field in dataclasses.fields(settings) if field.name == name)
    value = getattr(settings, name)
    return (value.strip() if isinstance(value, str) else value) == default


def key_text(value: Any) -> str:
    """Return settings as the text that keys of caches and digests are computed from.

    It is `Name(field=value, ...)` of the name and the fields in KEY, whatever class and fields are called today: a
    field that has another name now stands there as `stored=now`. A field that KEY lacks, because it was added later, is
    appended only if it is not the default. So renaming and adding change no key.
    """
    name, stored, later = _key_fields(type(value))
    pairs = [f"{text}={getattr(value, field)!r}" for text, field in stored]
    pairs += [f"{field}={getattr(value, field)!r}" for field in later if not is_as_before(value, field)]
    return f"{name}({', '.join(pairs)})"


@functools.cache
def _key_fields(kind: type) -> tuple[str, list[tuple[str, str]], list[str]]:
    """Return the name in KEY, its fields as (stored name, name of today), and the names of fields added later."""
    name, *entries = kind.KEY  # type: ignore[attr-defined]
    stored = [(text, field or text) for text, _, field in (entry.partition("=") for entry in entries)]
    names = {field for _, field in stored}
    return name, stored, [field.name for field in dataclasses.fields(kind) if field.name not in names]


def last_of_path(text: str) -> str:
    """Return the last component of an absolute path, and a repository id or a relative name unchanged.

    A text is an absolute path if it starts with a slash, a backslash or a drive letter.
    """
    is_absolute = text.startswith(("/", "\\")) or text[1:2] == ":"
    return text.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] if is_absolute else text
