"""Names of classes and fields in files, cache keys and digests. They stay when the code is renamed.

A class whose keys are hashed says in KEY under which name, and with which fields in which order:

    KEY: ClassVar[tuple[str, ...]] = ("Placement", "bucket", "resize", "crop")

A class, hashed or not, one of whose fields was renamed says under which name the field is stored:

    STORED: ClassVar[Mapping[str, str]] = {"crop_offset": "crop"}  # name of today -> stored name

LATER and UNRECORDED: see config/serialize.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

PLAIN = frozenset((str, int, float, bool, type(None)))  # repr writes their value, and no name of ours


def stored_fields(kind: type) -> dict[str, str]:
    """Return the fields of a dataclass: name of today -> stored name."""
    renamed = getattr(kind, "STORED", {})
    return {field.name: renamed.get(field.name, field.name) for field in dataclasses.fields(kind)}


def stored_values(value: Any) -> dict[str, Any]:
    """Return the values of a dataclass by the stored names of its fields."""
    return {stored: getattr(value, name) for name, stored in stored_fields(type(value)).items()}


def is_as_before(settings: Any, name: str) -> bool:
    """Return whether a field has its default, with which a run does the same as before the field was added."""
    default = next(field.default for field in dataclasses.fields(settings) if field.name == name)
    value = getattr(settings, name)
    return (value.strip() if isinstance(value, str) else value) == default


def key_text(value: Any) -> str:
    """Return settings as the text that keys of caches and digests are computed from: `Name(field=value, ...)`.

    Name and fields are those of KEY. A field of LATER that KEY lacks is appended only if it is not the default. So
    neither a new name nor a new field changes the key of what was there before.
    """
    name, first, later = _key_fields(type(value))
    pairs = [f"{stored}={_value_text(getattr(value, field))}" for stored, field in first]
    pairs += [
        f"{stored}={_value_text(getattr(value, field))}" for stored, field in later if not is_as_before(value, field)
    ]
    return f"{name}({', '.join(pairs)})"


def _value_text(value: Any) -> str:
    kind = type(value)
    if kind in PLAIN or (kind is tuple and PLAIN.issuperset(map(type, value))):
        return repr(value)
    if kind is tuple:
        return f"({', '.join(map(_value_text, value))}{',' if len(value) == 1 else ''})"
    assert hasattr(value, "KEY"), f"{type(value).__name__} has no KEY, so renaming it would change keys of caches"
    return key_text(value)


@functools.cache
def _key_fields(kind: type) -> tuple[str, list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the name in KEY, its fields as (stored name, name of today), and those that were added later."""
    name, *order = kind.KEY  # type: ignore[attr-defined]
    by_stored = {stored: field for field, stored in stored_fields(kind).items()}
    gone = [stored for stored in order if stored not in by_stored]
    assert not gone, f"{kind.__name__}.KEY has {gone}, which no field has: map the new names in STORED"
    decided = {*sum(getattr(kind, "LATER", ()), ()), *getattr(kind, "UNRECORDED", ())}
    later = [(stored, field) for stored, field in by_stored.items() if stored not in order]
    undecided = [field for _, field in later if field not in decided]
    assert not undecided, f"{kind.__name__} has fields {undecided} that neither KEY nor LATER lists"
    return name, [(stored, by_stored[stored]) for stored in order], later
