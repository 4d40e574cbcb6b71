"""Subgraph definitions unfolded into scopes, one for each instance, with the values set on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..problems import Problem, UserError
from .canvas import INPUT_NODE, Canvas, CanvasNode
from .graph import Schema
from .lines import Scope
from .widget_values import is_controlled

MAX_NODES = 20_000  # all instances unfolded; definitions in definitions can grow without end


def unfold(main: Canvas, definitions: Mapping[str, Canvas], schemas: Mapping[str, Schema], problems: list[Problem], where: str) -> Scope:
    """The main canvas's scope, with those of its instances, theirs, and so on.

    Raises:
        UserError: a subgraph contains itself, or all of it is too large.
    """
    root = Scope(main)
    waiting: list[tuple[Scope, tuple[str, ...]]] = [(root, ())]
    num_nodes = len(main.nodes)
    while waiting:
        scope, path = waiting.pop()
        for node in scope.canvas.nodes.values():
            definition = definitions.get(node.type)
            if definition is None:
                continue
            if node.type in path:
                ring = [definitions[key].name or key for key in (*path[path.index(node.type) :], node.type)]
                raise UserError([*problems, Problem(where, f"has a subgraph that contains itself: {' > '.join(ring)}; take the innermost away")])
            num_nodes += len(definition.nodes)
            if num_nodes > MAX_NODES:
                raise UserError([*problems, Problem(where, f"has more than {MAX_NODES} nodes once its subgraphs are unfolded; export a smaller one")])
            child = _instance(scope, node, definition, definitions, schemas)
            scope.children[node.id] = child
            waiting.append((child, (*path, node.type)))
    return root


def _instance(outer: Scope, node: CanvasNode, definition: Canvas, definitions: Mapping[str, Canvas], schemas: Mapping[str, Schema]) -> Scope:
    scope = Scope(definition, f"{outer.prefix}{node.id}:", node, outer)
    values = node.values if isinstance(node.values, list) else []
    promoted: dict[str, Any] = {}
    inner: dict[tuple[str, str], Any] = {}
    places = _places(node, definition, definitions, schemas, len(values))
    for (owner, name), value in zip(places, values):
        if value is None or not name:
            continue
        if owner == "-1":
            promoted[name] = value
        else:
            inner[owner, name] = value
    for (owner, name), value in outer.inner.items():  # set from further out, on a widget of this instance
        if owner == node.id:
            promoted[name] = value
    return replace(scope, promoted=promoted, inner=inner)


def _places(node: CanvasNode, definition: Canvas, definitions: Mapping[str, Canvas], schemas: Mapping[str, Schema], num_values: int) -> list[tuple[str, str]]:
    """Whose value stands where: ("-1", input) or (inner node, widget); ("", "") is a control's."""
    if node.proxies:
        return list(node.proxies)
    widgets = [(slot.name, *_widget_behind(definition, index, definitions, schemas)) for index, slot in enumerate(definition.inputs)]
    inputs = [(name, controlled) for name, is_widget, controlled in widgets if is_widget]
    places: list[tuple[str, str]] = []
    for name, controlled in inputs:
        places.append(("-1", name))
        if controlled and num_values > len(inputs):  # some editors saved the control's value as well
            places.append(("", ""))
    return places


def _widget_behind(definition: Canvas, index: int, definitions: Mapping[str, Canvas], schemas: Mapping[str, Schema]) -> tuple[bool, bool]:
    """(a subgraph's input stands for a widget, one with a control). The first of its links that leads to a widget counts."""
    for link_id, link in definition.links.items():
        if link.origin != INPUT_NODE or link.origin_slot != index or link.target not in definition.nodes:
            continue
        target = definition.nodes[link.target]
        slot = next((slot for slot in target.inputs if slot.link == link_id), None)
        if slot is None:
            continue
        if target.type in definitions:
            inside = definitions[target.type]
            position = next((i for i, item in enumerate(inside.inputs) if item.name == slot.name), -1)
            found = _widget_behind(inside, position, definitions, schemas) if position >= 0 else (False, False)
            if found[0]:
                return found
        elif slot.widget:
            return True, is_controlled(slot.widget, schemas.get(target.type))
    return False, False
