"""Node specifications: one definition per field for its widget, validation, default, tooltip and documentation.

The inputs of a node are a frozen dataclass with annotated fields:

    rank: Annotated[int, Range(1, 512), Doc("Inner dimension of the update.")] = 16

The order of the fields is the order of `widgets_values` in saved workflows: add new fields at the end, and never rename
a field.
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
    """Inclusive bounds of a number, and the step of the editor's arrow buttons.

    The editor rounds a float widget without a step to 0.1.
    """

    low: float
    high: float
    step: float = 1


@dataclass(frozen=True)
class Choice:
    """A choice of one of these options."""

    options: tuple[str, ...]

    def __init__(self, *options: str):
        object.__setattr__(self, "options", options)


@dataclass(frozen=True)
class ModelFile:
    """A file from ComfyUI's model folders of this kind, or `none_label` for no file, or one of `others`."""

    kind: str
    none_label: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Doc:
    """Text of the tooltip and of the documentation page."""

    text: str


@dataclass(frozen=True)
class Text:
    """Appearance of a text widget."""

    multiline: bool = False
    placeholder: str = ""


@dataclass(frozen=True)
class Seed:
    """A seed. The editor adds a `control_after_generate` widget, which takes one more value in saved workflows."""


@dataclass(frozen=True)
class Socket:
    """An input socket of this type instead of a widget."""

    type: str


@dataclass(frozen=True)
class Each:
    """A list with one value for each image. ComfyUI runs the node once with all of them, and the node checks them itself.

    Headless, such a value may come from a node that only runs in ComfyUI, see `stored` of NodeSpec.
    """


@dataclass(frozen=True)
class Initial:
    """The value of a widget in new nodes of the editor, where it is not the default.

    Workflows store every value, and one that lacks the field keeps the default: it trains as before.
    """

    value: Any


@dataclass(frozen=True)
class Advanced:
    """An advanced widget, which the editor hides by default."""


@dataclass(frozen=True)
class Last:
    """A field that comes after all others, also after those of a subclass of the inputs.

    For new fields of settings that several nodes have: saved workflows store values by position, so that a field must
    not come before older ones.
    """


@dataclass(frozen=True)
class Field:
    """A field of a node's inputs, with its annotations resolved."""

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
    last: bool = False
    initial: Any = None
    each: bool = False

    @property
    def is_widget(self) -> bool:
        """Whether the field is a widget rather than a socket."""
        return self.socket is None


@dataclass(frozen=True)
class Output:
    """An output of a node: name, type and description."""

    name: str
    type: str
    doc: str
    is_list: bool = False


ABSENT = object()  # in place of an output that does not exist yet: nodes connected to it do not run


@dataclass(frozen=True)
class NodeSpec:
    """Definition of a node, independent of ComfyUI.

    Args:
        id: node id. Workflows refer to it, so it never changes.
        title: display name.
        category: menu path in ComfyUI.
        description: one or two sentences for the node list and the documentation.
        inputs: frozen dataclass, see the module docstring. It may have a method `problems(self) -> list[Problem]` that
            checks fields against each other.
        outputs: outputs, in order.
        run: run(inputs, host) returns a tuple with one value per output. It imports heavy modules when it is called.
        light: run is fast, needs no torch and writes nothing, so the workflow check calls it too.
        preflight: preflight(inputs, host) returns problems that can be found before a model is loaded. For nodes that
            are not light.
        accepts: accepts(inputs, sources) returns problems of the connections: what the nodes before it will make, and this
            node can't take. sources: the inputs of those nodes, by the field that is connected.
        within: within(inputs, graph, node_id) returns problems of the inputs with the graph around the node, where `accepts`
            finds none. For nodes whose values name others.
        review: review(inputs, host) returns warnings for `chroma-trainer check`, where preflight finds no problem. It
            may take longer than preflight.
        fingerprint: fingerprint(values, paths) returns a text that changes when the files behind the values change, so
            that the node runs again.
        identity: identity(inputs) returns a field and the value of it that no other node of this type may have.
        is_output: ComfyUI executes the graph for this node (an output node).
        search_aliases: other words that find the node in ComfyUI's search.
        stored: stored(inputs, host) returns the outputs of an earlier run in ComfyUI. A headless run calls it in place
            of `run` where values of `Each` fields come from nodes that only run in ComfyUI. It is fast and writes
            nothing.
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
    identity: Callable[[Any], tuple[str, str]] | None = None
    is_output: bool = False
    search_aliases: tuple[str, ...] = ()
    review: Callable[[Any, Any], list[str]] | None = None
    stored: Callable[[Any, Any], tuple[Any, ...]] | None = None
    accepts: Callable[[Any, Mapping[str, Any]], list[Problem]] | None = None
    within: Callable[[Any, Any, str], list[Problem]] | None = None

    def fields(self) -> tuple[Field, ...]:
        """Return the fields of the inputs, in order."""
        return fields_of(self.inputs)

    @property
    def takes_lists(self) -> bool:
        """Whether the node runs once with lists, instead of once for each of their values."""
        return any(field.each for field in self.fields())


@cache
def fields_of(inputs: type) -> tuple[Field, ...]:
    """Return the fields of an inputs dataclass, in order, inherited fields first and those marked Last at the end."""
    hints = typing.get_type_hints(inputs, include_extras=True)
    fields = (_resolve_field(item, hints[item.name]) for item in dataclasses.fields(inputs))
    return tuple(sorted(fields, key=lambda field: field.last))


def _resolve_field(item: dataclasses.Field, hint: Any) -> Field:
    assert typing.get_origin(hint) is Annotated, f"{item.name} needs Annotated[type, ..., Doc(...)]"
    base, *marks = typing.get_args(hint)
    by_type = {type(mark): mark for mark in marks}
    required = item.default is dataclasses.MISSING
    default = None if required else item.default
    return Field(
        name=item.name,
        kind=base,
        doc=by_type[Doc].text,
        default=default,
        required=required,
        range=by_type.get(Range),
        choice=by_type.get(Choice),
        model_file=by_type.get(ModelFile),
        text=by_type.get(Text),
        socket=by_type.get(Socket),
        seed=Seed in by_type,
        advanced=Advanced in by_type,
        last=Last in by_type,
        initial=by_type[Initial].value if Initial in by_type else default,
        each=Each in by_type,
    )


def check_value(field: Field, value: Any) -> tuple[Any, Problem | None]:
    """Convert a value to the type of the field, and validate it.

    In JSON, 1 is a valid float and 1.0 a valid int, but "1" is neither.

    Returns:
        The converted value (the value itself if it is invalid), and the problem, or None.
    """
    if field.kind is bool:
        return _reject(field, value, "true or false") if not isinstance(value, bool) else (value, None)
    if field.kind in (int, float):
        return _check_number(field, value)
    if field.kind is str:
        if not isinstance(value, str):
            return _reject(field, value, "a string")
        if not _is_utf8(value):
            return _reject(field, value, "valid UTF-8 without NUL characters; type it again")
        if field.choice and value not in field.choice.options:
            hint = nearest(value, field.choice.options)
            return _reject(field, value, f"one of {', '.join(field.choice.options)}{hint}")
    return value, None


def _check_number(field: Field, value: Any) -> tuple[Any, Problem | None]:
    expected = "whole number" if field.kind is int else "number"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        bounds = (
            f"; use {_format_bound(field, field.range.low)} to {_format_bound(field, field.range.high)}"
            if field.range
            else ""
        )
        return _reject(field, value, f"a {expected}{bounds}")
    if not abs(value) <= sys.float_info.max:  # NaN, infinite, or an int that does not fit into a float
        return _reject(field, value, f"a finite {expected}")
    if field.kind is int and value != int(value):
        return _reject(field, value, f"a {expected}; use {math.floor(value)} or {math.ceil(value)}")
    number = field.kind(value)
    if field.range and not field.range.low <= number <= field.range.high:
        clamped = min(max(number, field.range.low), field.range.high)
        low, high, nearest_valid = (
            _format_bound(field, bound) for bound in (field.range.low, field.range.high, clamped)
        )
        return number, Problem(field.name, f"{value} is out of range; use {low} to {high}, nearest is {nearest_valid}")
    return number, None


def _format_bound(field: Field, bound: float) -> str:
    return f"{bound:g}" if field.kind is float else str(int(bound))


def _is_utf8(text: str) -> bool:
    """Return whether a text can be a file name or a prompt: no lone surrogates and no NUL."""
    try:
        return b"\0" not in text.encode("utf-8")
    except UnicodeEncodeError:
        return False


def _reject(field: Field, value: Any, expected: str) -> tuple[Any, Problem]:
    quoted = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return value, Problem(field.name, f"{quoted} is not {expected}")


def build_inputs(spec: NodeSpec, values: Mapping[str, Any]) -> tuple[Any | None, list[Problem]]:
    """Build the inputs dataclass from named values.

    Socket values are not checked. Unknown names are problems.

    Returns:
        The inputs, or None if there are problems; and all problems.
    """
    draft = draft_inputs(spec, values)
    return (None if draft.problems else draft.inputs), draft.problems


@dataclass(frozen=True)
class Draft:
    """Inputs with defaults in place of invalid values, so that a check can continue.

    Args:
        inputs: the inputs dataclass. Required fields without a valid value are None.
        problems: all problems.
        complete: no required field is missing or invalid.
    """

    inputs: Any
    problems: list[Problem]
    complete: bool


def draft_inputs(spec: NodeSpec, values: Mapping[str, Any]) -> Draft:
    """Build the inputs dataclass, and collect all problems: first of single fields, then of fields together."""
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
                problems.append(Problem(name, f"required input is missing; {_suggest_fix(field)}"))
            continue
        if field.socket or (field.each and isinstance(values[name], list)):
            checked[name] = values[name]
            continue
        value, problem = check_value(field, values[name])
        if problem:
            problems.append(problem)
        else:
            checked[name] = value
    missing = {name: None for name, field in fields.items() if field.required and name not in checked}
    inputs = spec.inputs(**checked, **missing)
    invalid = {problem.field for problem in problems}
    of_combinations = inputs.problems() if hasattr(inputs, "problems") else []
    problems += [problem for problem in of_combinations if problem.field not in invalid]
    return Draft(inputs, problems, not missing)


def _suggest_fix(field: Field) -> str:
    return f"connect an output of type {field.socket.type}" if field.socket else "set a value"
