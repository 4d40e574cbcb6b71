"""What is recorded of settings: no path of this machine, and nothing of a field that came later while it is as before."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
from chroma_trainer.trainer_core.config import adapter, dataset, flux, memory, model, optimizer, training, validation
from chroma_trainer.trainer_core.config.serialize import last_of_path, to_record


@dataclass(frozen=True)
class Part:
    PATHS: ClassVar = ("folder", "masks")
    LATER: ClassVar = (("masks", "weight"),)
    UNRECORDED: ClassVar = ("found_at",)

    folder: str
    found_at: str = ""
    masks: str = ""
    weight: float = 0.1


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    part: Part | None = None


def test_fields_that_came_later_are_recorded_only_where_they_do_something():
    assert to_record(Part("a", "/here/a")) == {"folder": "a"} == to_record(Part("a", masks="  ", weight=0.5))
    assert to_record(Part("/home/me/a", masks="C:\\pictures\\b", weight=0.5)) == {
        "folder": "a",
        "masks": "b",
        "weight": 0.5,
    }


def test_settings_within_settings():
    assert to_record(Whole((Part("a"), Part("b")), None)) == {"parts": ({"folder": "a"}, {"folder": "b"}), "part": None}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/b/", "b"),
        ("C:\\x\\y.safetensors", "y.safetensors"),
        ("\\\\share\\x", "x"),
        ("org/name", "org/name"),
        ("rel/x", "rel/x"),
        ("", ""),
    ],
)
def test_the_last_name_of_a_path(path, name):
    assert last_of_path(path) == name


@pytest.mark.parametrize("module", [adapter, dataset, flux, memory, model, optimizer, training, validation])
def test_what_is_said_of_fields_is_said_of_fields_that_there_are(module):
    for kind in vars(module).values():
        if not dataclasses.is_dataclass(kind):
            continue
        said = [*getattr(kind, "PATHS", ()), *getattr(kind, "UNRECORDED", ()), *sum(getattr(kind, "LATER", ()), ())]
        names = {field.name: field for field in dataclasses.fields(kind)}
        assert set(said) <= names.keys()
        assert all(names[first].default is not dataclasses.MISSING for first, *_ in getattr(kind, "LATER", ()))
