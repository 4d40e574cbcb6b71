"""--set LoRATrainer.learning_rate=1e-4: values replaced by node title, id or type."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import Problem, UserError, nearest
from ..spec import NodeSpec
from .graph import Graph, Node


def override(graph: Graph, settings: Sequence[str], catalogue: Mapping[str, NodeSpec]) -> Graph:
    """The graph with the named values replaced. A setting is NODE.FIELD=VALUE; NODE is an id, a title or a type.

    Raises:
        UserError: every setting that names no node, several, or no field.
    """
    problems: list[Problem] = []
    nodes = dict(graph.nodes)
    for setting in settings:
        target, equals, text = setting.partition("=")
        name, dot, field = target.rpartition(".")
        if not equals or not dot:
            problems.append(
                Problem(f"--set {setting}", "is not NODE.FIELD=VALUE; write for example LoRATrainer.steps=200")
            )
            continue
        found = _find_nodes(nodes, name)
        if len(found) != 1:
            problems.append(Problem(f"--set {setting}", _miss(nodes, name, found)))
            continue
        node = found[0]
        fields = (
            {item.name: item for item in catalogue[node.type].fields() if item.is_widget}
            if node.type in catalogue
            else {}
        )
        if node.type in catalogue and field not in fields:
            is_socket = any(item.name == field for item in catalogue[node.type].fields())
            unknown = f"{node.type} has no field {field!r}{nearest(field, tuple(fields))}"
            fault = f"{node.type}.{field} is a connection, not a value" if is_socket else unknown
            problems.append(Problem(f"--set {setting}", fault))
            continue
        kind = fields[field].kind if field in fields else None
        nodes[node.id] = replace(node, inputs={**node.inputs, field: text if kind is str else _value(text)})
    if problems:
        raise UserError(problems)
    return replace(graph, nodes=nodes)


def _find_nodes(nodes: Mapping[str, Node], name: str) -> list[Node]:
    for key in ("id", "title", "type"):
        found = [node for node in nodes.values() if getattr(node, key) == name]
        if found:
            return found
    return []


def _miss(nodes: Mapping[str, Node], name: str, found: list[Node]) -> str:
    if found:
        return f"{name!r} names {len(found)} nodes; use one of the ids {', '.join(node.id for node in found)}"
    known = [*{node.type for node in nodes.values()}, *{node.title for node in nodes.values()}]
    hint = nearest(name, known) or f"; there are {', '.join(dict.fromkeys(node.type for node in nodes.values()))}"
    return f"no node is called {name!r}{hint}"


def _value(text: str) -> Any:
    """JSON where it is JSON, True/False as Python users write them, else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        try:
            return float(text)
        except ValueError:
            return text
