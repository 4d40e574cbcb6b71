"""Get named values from `widgets_values`, which the editor saves by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..graph import Schema, Widget
from .graph_json import CanvasNode

CONTROL = "control_after_generate"
CONTROL_VALUES = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
SEED_NAMES = ("seed", "noise_seed")


def values_of(node: CanvasNode, schema: Schema | None) -> dict[str, Any]:
    """Return {widget name: value}. Linked widgets keep their position in the list, so they have a value here too.

    Positions take precedence if both are saved, because that is how the web page loads a file. Without a schema the
    names
    are those saved with the node; if they do not account for every value, the result is empty.
    """
    if schema is None:
        return _guess_names(node)
    if isinstance(node.values, dict):
        return _read_by_name(schema.widgets, node.values)
    return _read_by_position(schema.widgets, node.values)


def is_controlled(widget: str, schema: Schema | None) -> bool:
    """Return whether the widget's value is followed by that of a control."""
    has_control = {item.name: item.control for item in schema.widgets} if schema else {}
    return has_control.get(widget, widget.rpartition(".")[2] in SEED_NAMES)


def _read_by_name(widgets: Sequence[Widget], values: Mapping[str, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for widget in widgets:
        named[widget.name] = _use_default(values.get(widget.name), widget)
        named.update(_read_by_name(widget.options.get(str(named[widget.name]), ()), values))
    return named


def _read_by_position(widgets: Sequence[Widget], values: Sequence[Any]) -> dict[str, Any]:
    """Use defaults for missing values; a DynamicCombo's own widgets follow its choice."""
    named: dict[str, Any] = {}
    waiting, position = list(widgets), 0
    while waiting:
        widget = waiting.pop(0)
        named[widget.name] = _use_default(values[position] if position < len(values) else None, widget)
        position += 1
        if widget.control and _is_control(values, position):
            position += 1
        waiting[:0] = widget.options.get(str(named[widget.name]), ())
    return named


def _use_default(value: Any, widget: Widget) -> Any:
    """Return the value, or the default for null, which the editor saves for values that are not numbers."""
    return widget.default if value is None else value


def _is_control(values: Sequence[Any], position: int) -> bool:
    """Return whether the value at this position is a control's. Lists written by hand may lack it."""
    return position < len(values) and (values[position] is None or values[position] in CONTROL_VALUES)


def _guess_names(node: CanvasNode) -> dict[str, Any]:
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
