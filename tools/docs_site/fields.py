"""Griffe extension: a field `name: Annotated[T, ..., Doc("text")]` of a config is documented as `name: T`, with its text and bounds."""

from __future__ import annotations

import importlib
from typing import Any

import griffe
from chroma_trainer.trainer_core.spec import Field, fields_of


class Fields(griffe.Extension):
    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        annotation, owner = attr.annotation, attr.parent
        if isinstance(annotation, griffe.ExprName) and annotation.name == "ClassVar":
            attr.labels.discard("instance-attribute")  # not a parameter; Griffe knows only ClassVar[...]
        if ".config." not in attr.path or owner is None or not isinstance(annotation, griffe.ExprSubscript):
            return
        if annotation.canonical_name != "Annotated" or not isinstance(annotation.slice, griffe.ExprTuple):
            return
        inputs = getattr(importlib.import_module(attr.module.path), owner.name)
        field = next(field for field in fields_of(inputs) if field.name == attr.name)
        attr.annotation = annotation.slice.elements[0]
        attr.labels.clear()
        attr.docstring = griffe.Docstring(describe(field), parent=attr)


def describe(field: Field) -> str:
    if field.range:
        return f"{field.doc} From {field.range.low:g} to {field.range.high:g}."
    if field.choice:
        return f"{field.doc} One of {', '.join(f'`{option}`' for option in field.choice.options)}."
    return field.doc
