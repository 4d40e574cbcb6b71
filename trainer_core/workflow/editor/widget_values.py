"""Named values from `widgets_values`, which the editor saves by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..graph import Schema, Widget
from .graph_json import CanvasNode

CONTROL = "control_after_generate"
CONTROL_VALUES = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
SEED_NAMES = ("seed", "noise_seed")


def values_of(node: CanvasNode, schema: Schema | None) -> dict[str, Any]:
    """Widget name -> value. A linked widget holds its place in the list, so it has a value here as well.

    Positions count where both are saved: that is how the page loads a file. Without a schema the names
    are those saved with the node; where they don't account for every value, none is given.
    """
    if schema is None:
        return _without_schema(node)
    if isinstance(node.values, dict):
        return _by_name(schema.widgets, node.values)
    return _by_position(schema.widgets, node.values)


def is_controlled(widget: str, schema: Schema | None) -> bool:
    """A control's value follows this widget's."""
    known = {item.name: item.control for item in schema.widgets} if schema else {}
    return known.get(widget, widget.rpartition(".")[2] in SEED_NAMES)


def _by_name(widgets: Sequence[Widget], values: Mapping[str, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for widget in widgets:
        named[widget.name] = _or_default(values.get(widget.name), widget)
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
    """The editor writes null for what is no number; ComfyUI then takes the default."""
    return widget.default if value is None else value


def _is_control(values: Sequence[Any], position: int) -> bool:
    """Lists written by hand may lack the control's value."""
    return position < len(values) and (values[position] is None or values[position] in CONTROL_VALUES)


def _without_schema(node: CanvasNode) -> dict[str, Any]:
    if node.named or isinstance(node.values, dict):
        by_name = node.named or dict(node.values)
        return {name: value for name, value in by_name.items() if not name.endswith(CONTROL)}
    names = [slot.widget for slot in node.inputs if slot.widget]
    values, position = node.values, 0
    named: dict[str, Any] = {}
    for name in names:
        if position < len(values):
            named[name] = values[position]
        position += 1
        if len(values) > len(names) and is_controlled(name, None) and _is_control(values, position):
            position += 1
    return named if position >= len(values) else {}
