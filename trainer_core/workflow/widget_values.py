"""Named values from `widgets_values`, which the editor saves by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .canvas import CanvasNode
from .graph import Schema, Widget

CONTROLS = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
SEED_NAMES = ("seed", "noise_seed")


def values_of(node: CanvasNode, schema: Schema | None) -> dict[str, Any]:
    """Widget name -> value. A linked widget holds its place, so it has a value here as well.

    Without a schema the names come from what recent editors save with the node; where those don't cover the values, {} is
    the honest answer.
    """
    if schema is None:
        return _unlisted(node)
    if isinstance(node.values, dict):
        return _by_name(schema.widgets, node.values)
    return _by_position(schema.widgets, node.values)


def _by_name(widgets: Sequence[Widget], values: Mapping[str, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for widget in widgets:
        named[widget.name] = _or_default(values.get(widget.name), widget)
        if widget.options:
            named.update(_by_name(widget.options.get(str(named[widget.name]), ()), values))
    return named


def _by_position(widgets: Sequence[Widget], values: Sequence[Any]) -> dict[str, Any]:
    """Missing values take their defaults; a DynamicCombo's own widgets follow its choice."""
    named: dict[str, Any] = {}
    waiting, position = list(widgets), 0
    while waiting:
        widget = waiting.pop(0)
        named[widget.name] = _or_default(values[position] if position < len(values) else None, widget)
        position += 1
        if widget.control and _is_control(values, position):
            position += 1
        waiting[:0] = widget.options.get(str(named[widget.name]), ())
    return named


def _or_default(value: Any, widget: Widget) -> Any:
    """The editor writes null for a number that is none; ComfyUI then takes the default, and so do we."""
    return widget.default if value is None else value


def is_controlled(name: str, schema: Schema | None) -> bool:
    """A control's value follows this widget's."""
    known = {widget.name: widget.control for widget in schema.widgets} if schema else {}
    return known.get(name, name in SEED_NAMES)


def _is_control(values: Sequence[Any], position: int) -> bool:
    """Files written by hand may lack the control's value."""
    return position < len(values) and (values[position] is None or values[position] in CONTROLS)


def _unlisted(node: CanvasNode) -> dict[str, Any]:
    """A node that we have no schema for."""
    if node.named:
        return {name: value for name, value in node.named.items() if not name.endswith("control_after_generate")}
    if isinstance(node.values, dict):
        return dict(node.values)
    names = [slot.widget for slot in node.inputs if slot.widget]
    named: dict[str, Any] = {}
    position = 0
    for name in names:
        if position < len(node.values):
            named[name] = node.values[position]
        position += 1
        if name.rpartition(".")[2] in SEED_NAMES and len(node.values) > len(names) and _is_control(node.values, position):
            position += 1
    return named if position >= len(node.values) else {}
