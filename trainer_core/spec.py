"""One definition of a field: the widget, the check, the default, the tooltip and the line in the docs.

A node's inputs are a frozen dataclass whose annotations carry the rest:

    rank: Annotated[int, Range(1, 512), Doc("Inner dimension of the update.")] = 16

Field order is the order of `widgets_values` in workflows saved by the editor: new fields go last, names never change.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from .errors import Problem, nearest


@dataclass(frozen=True)
class Range:
    """Inclusive bounds and the step of the editor's arrows (a float without a step is rounded to 0.1 by the editor)."""

    low: float
    high: float
    step: float = 1


@dataclass(frozen=True)
class Choice:
    """One of these names."""

    options: tuple[str, ...]

    def __init__(self, *options: str):
        object.__setattr__(self, "options", options)


@dataclass(frozen=True)
class ModelFile:
    """A file from the models folders of this kind, or `none_label` for none."""

    kind: str
    none_label: str


@dataclass(frozen=True)
class Doc:
    """Tooltip and docs text, one or two sentences."""

    text: str


@dataclass(frozen=True)
class Text:
    """A text field's manner."""

    multiline: bool = False
    placeholder: str = ""


@dataclass(frozen=True)
class Seed:
    """A seed: the editor gives it a control for what happens after a run, and saves one value more."""


@dataclass(frozen=True)
class Socket:
    """A connection of this type instead of a widget."""

    type: str


@dataclass(frozen=True)
class Advanced:
    """Folded away until asked for."""


@dataclass(frozen=True)
class Field:
    """A resolved field of a node's inputs."""

    name: str
    kind: type
    doc: str
    default: Any
    required: bool
    range: Range | None = None
    choice: Choice | None = None
    model_file: ModelFile | None = None
    text: Text | None = None
    socket: Socket | None = None
    seed: bool = False
    advanced: bool = False

    @property
    def is_widget(self) -> bool:
        return self.socket is None


@dataclass(frozen=True)
class Output:
    """One output of a node: its name, its type and what it is."""

    name: str
    type: str
    doc: str
    is_list: bool = False


@dataclass(frozen=True)
class NodeSpec:
    """A node as data: what it is called, what it takes, what it gives, and where its function lies.

    Args:
        id: never renamed; workflows refer to it.
        inputs: frozen dataclass, see the module's docstring. A method `problems(self) -> list[Problem]` may check fields together.
        run: run(inputs, host) -> a tuple as long as outputs. Imports what is heavy only when it is called.
        light: run is quick, needs no torch and writes nothing, so that a check of the workflow calls it as well.
        preflight: preflight(inputs, host) -> problems that can be seen before a model loads; for nodes that are not light.
        fingerprint: fingerprint(values, paths) -> a text that changes when files behind equal values change, so that the node runs again.
        is_output: the run starts from nodes like this one.
    """

    id: str
    title: str
    category: str
    description: str
    inputs: type
    outputs: tuple[Output, ...]
    run: Callable[[Any, Any], tuple[Any, ...]]
    light: bool = False
    preflight: Callable[[Any, Any], list[Problem]] | None = None
    fingerprint: Callable[[Mapping[str, Any], Any], str] | None = None
    is_output: bool = False
    search_aliases: tuple[str, ...] = ()

    def fields(self) -> tuple[Field, ...]:
        return fields_of(self.inputs)


@cache
def fields_of(inputs: type) -> tuple[Field, ...]:
    """The fields of an inputs dataclass, in order, inherited ones first."""
    hints = typing.get_type_hints(inputs, include_extras=True)
    return tuple(_field(item, hints[item.name]) for item in dataclasses.fields(inputs))


def _field(item: dataclasses.Field, hint: Any) -> Field:
    assert typing.get_origin(hint) is Annotated, f"{item.name} needs Annotated[type, ..., Doc(...)]"
    base, *marks = typing.get_args(hint)
    found = {type(mark): mark for mark in marks}
    required = item.default is dataclasses.MISSING
    return Field(
        name=item.name,
        kind=base,
        doc=found[Doc].text,
        default=None if required else item.default,
        required=required,
        range=found.get(Range),
        choice=found.get(Choice),
        model_file=found.get(ModelFile),
        text=found.get(Text),
        socket=found.get(Socket),
        seed=Seed in found,
        advanced=Advanced in found,
    )


def check_value(field: Field, value: Any) -> tuple[Any, Problem | None]:
    """The value in the field's own type, and the fault it has, if any. JSON's 1 is a fine float, 1.0 a fine int, "1" is neither."""
    if field.kind is bool:
        return _fault(field, value, "true or false") if not isinstance(value, bool) else (value, None)
    if field.kind in (int, float):
        return _check_number(field, value)
    if field.kind is str:
        if not isinstance(value, str):
            return _fault(field, value, "a text")
        if not _is_utf8(value):
            return _fault(field, value, "a text in UTF-8 without NUL; write it again")
        if field.choice and value not in field.choice.options:
            hint = nearest(value, field.choice.options)
            return _fault(field, value, f"one of {', '.join(field.choice.options)}{hint}")
    return value, None


def _check_number(field: Field, value: Any) -> tuple[Any, Problem | None]:
    wanted = "a whole number" if field.kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        low_high = f"; use {_bound(field, field.range.low)} to {_bound(field, field.range.high)}" if field.range else ""
        return _fault(field, value, wanted + low_high)
    if not abs(value) <= sys.float_info.max:  # NaN, infinite, or an int that no float holds
        return _fault(field, value, f"{wanted}, and finite")
    if field.kind is int and value != int(value):
        return _fault(field, value, f"{wanted}; use {math.floor(value)} or {math.ceil(value)}")
    number = field.kind(value)
    if field.range and not field.range.low <= number <= field.range.high:
        clamped = min(max(number, field.range.low), field.range.high)
        shown = [_bound(field, bound) for bound in (field.range.low, field.range.high, clamped)]
        return number, Problem(
            field.name, f"{value} is out of range; use {shown[0]} to {shown[1]}, nearest is {shown[2]}"
        )
    return number, None


def _bound(field: Field, bound: float) -> str:
    return f"{bound:g}" if field.kind is float else str(int(bound))


def _is_utf8(text: str) -> bool:
    """Neither half of a surrogate pair nor NUL: no file, name or prompt may hold one."""
    try:
        return b"\0" not in text.encode("utf-8")
    except UnicodeEncodeError:
        return False


def _fault(field: Field, value: Any, wanted: str) -> tuple[Any, Problem]:
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return value, Problem(field.name, f"{shown} is not {wanted}")


def build_inputs(spec: NodeSpec, values: Mapping[str, Any]) -> tuple[Any | None, list[Problem]]:
    """The inputs dataclass from named values, or every fault. Sockets are taken as they are; unknown names are faults."""
    draft = draft_inputs(spec, values)
    return (None if draft.problems else draft.inputs), draft.problems


@dataclass(frozen=True)
class Draft:
    """Inputs with defaults in place of what is at fault, so that a check can go on.

    Args:
        complete: nothing that has no default is missing.
    """

    inputs: Any
    problems: list[Problem]
    complete: bool


def draft_inputs(spec: NodeSpec, values: Mapping[str, Any]) -> Draft:
    """The inputs dataclass and every fault: of each field alone, then of fields together."""
    fields = {field.name: field for field in spec.fields()}
    problems = [
        Problem(name, f"{spec.id} has no input of this name{nearest(name, tuple(fields))}")
        for name in values
        if name not in fields
    ]
    checked: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in values:
            if field.required:
                problems.append(Problem(name, f"nothing is connected; {_describe_wanted(field)}"))
            continue
        if field.socket:
            checked[name] = values[name]
            continue
        value, problem = check_value(field, values[name])
        if problem:
            problems.append(problem)
        else:
            checked[name] = value
    missing = {name: None for name, field in fields.items() if field.required and name not in checked}
    inputs = spec.inputs(**checked, **missing)
    faulty = {problem.field for problem in problems}
    together = inputs.problems() if hasattr(inputs, "problems") else []
    problems += [problem for problem in together if problem.field not in faulty]
    return Draft(inputs, problems, not missing)


def _describe_wanted(field: Field) -> str:
    return f"connect an output of type {field.socket.type}" if field.socket else "give a value"
