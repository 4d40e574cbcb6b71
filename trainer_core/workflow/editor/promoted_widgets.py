"""Values set on a subgraph's instance: find the input or inner widget that each of its `widgets_values` belongs to.

Frontends from 1.49 on save one value for each input that stands for a widget. Earlier ones list (inner node, widget) in
`proxyWidgets`, with "-1" for an input of the subgraph and null where the inner widget has the value. Some versions
saved the seed's control value as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..graph import Schema
from .graph_json import INPUT_NODE, Canvas, CanvasNode, Slot
from .widget_values import is_controlled

OWN_INPUT = "-1"
NESTED_NAME = re.compile(r"\s*(\d+)\s*:\s*(.+)")  # "7: text" is a widget of node 7 in a nested subgraph
Target = tuple[str, str]  # (inner node or OWN_INPUT, widget or input)


@dataclass(frozen=True)
class Promotion:
    """Resolves the inputs of subgraph definitions to widgets.

    Attributes:
        definitions: Subgraph definitions by id.
        schemas: Widget orders by node type.
        known: Cache of results, by definition and position.
    """

    definitions: Mapping[str, Canvas]
    schemas: Mapping[str, Schema]
    known: dict[tuple[str, int], tuple[bool, bool]] = field(default_factory=dict)

    def values(self, from_outside: Mapping[Target, Any], node: CanvasNode) -> tuple[dict[str, Any], dict[Target, Any]]:
        """Return (input -> value, inner widget -> value) of an instance.

        Args:
            from_outside: Values that the surrounding subgraph's instance sets on inner widgets, including this
                instance's.
            node: The instance.
        """
        definition = self.definitions[node.type]
        settings = self._saved_values(node)
        settings += [((OWN_INPUT, name), value) for (owner, name), value in from_outside.items() if owner == node.id]
        promoted: dict[str, Any] = {}
        inner: dict[Target, Any] = {}
        for (owner, name), value in settings:
            nested = NESTED_NAME.fullmatch(name)
            name_of_input = _input_for(definition, owner, name)
            if name_of_input:
                promoted[name_of_input] = value
            elif owner != OWN_INPUT:
                inner[owner, name] = value
            elif nested:
                inner[nested[1], nested[2]] = value
        return promoted, inner

    def _saved_values(self, node: CanvasNode) -> list[tuple[Target, Any]]:
        values = node.values if isinstance(node.values, list) else []
        targets = list(node.proxies) or self._list_targets(node, len(values))
        return [(target, value) for target, value in zip(targets, values, strict=False) if value is not None]

    def _list_targets(self, node: CanvasNode, num_values: int) -> list[Target]:
        """Return the inputs that stand for widgets, in the instance's own order if it lists them all."""
        controlled: dict[str, bool] = {}
        for position, slot in enumerate(self.definitions[node.type].inputs):
            is_widget, has_control = self._resolve_input(node.type, position)
            if is_widget:
                controlled[slot.name] = has_control
        own = [slot.name for slot in node.inputs if slot.name in controlled]
        targets: list[Target] = []
        for name in own if len(own) == len(controlled) else controlled:
            targets.append((OWN_INPUT, name))
            if controlled[name] and num_values > len(controlled):
                targets.append((OWN_INPUT, ""))
        return targets

    def _resolve_input(self, kind: str, position: int) -> tuple[bool, bool]:
        """Return whether an input of a definition stands for a widget, and for one with a control.

        The first link to a widget counts.
        """
        key = (kind, position)
        if key not in self.known:
            results = (
                self._resolve_slot(slot, target) for target, slot in _fed_slots(self.definitions[kind], position)
            )
            self.known[key] = next((pair for pair in results if pair[0]), (False, False))
        return self.known[key]

    def _resolve_slot(self, slot: Slot, target: CanvasNode) -> tuple[bool, bool]:
        if target.type not in self.definitions:
            return bool(slot.widget), is_controlled(slot.widget, self.schemas.get(target.type))
        names = [item.name for item in self.definitions[target.type].inputs]
        return self._resolve_input(target.type, names.index(slot.name)) if slot.name in names else (False, False)


def _fed_slots(definition: Canvas, position: int) -> list[tuple[CanvasNode, Slot]]:
    """Return the nodes and slots that an input of a definition feeds."""
    fed = {
        link_id: definition.nodes[link.target]
        for link_id, link in definition.links.items()
        if link.origin == INPUT_NODE and link.origin_slot == position and link.target in definition.nodes
    }
    return [(node, slot) for link_id, node in fed.items() for slot in node.inputs if slot.link == link_id]


def _input_for(definition: Canvas, owner: str, name: str) -> str:
    """Return the definition's input that a setting is for, or "".

    It is the input of that name, or the one that feeds that inner widget.
    """
    if owner == OWN_INPUT:
        return name if any(slot.name == name for slot in definition.inputs) else ""
    node = definition.nodes.get(owner)
    slot = next((slot for slot in node.inputs if name in (slot.widget, slot.name)), None) if node else None
    link = definition.links.get(slot.link) if slot else None
    if link is None or link.origin != INPUT_NODE or not 0 <= link.origin_slot < len(definition.inputs):
        return ""
    return definition.inputs[link.origin_slot].name
