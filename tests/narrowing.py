"""For values that are declared more widely than a test has them: check the value, and say its type to pyright."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """Return a value that is not None here."""
    assert value is not None
    return value


def of_type(value: object, kind: type[T]) -> T:
    """Return a value that is of this class here, such as a layer of a model."""
    assert isinstance(value, kind), f"{type(value).__name__} is no {kind.__name__}"
    return value


def each_of_type(values: Mapping[str, object], kind: type[T]) -> dict[str, T]:
    """Return values that are all of this class here, such as the layers of a LoRA."""
    return {name: of_type(value, kind) for name, value in values.items()}
