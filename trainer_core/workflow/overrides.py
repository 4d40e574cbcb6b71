"""Override values by node title, id or type: --set LoRATrainer.learning_rate=1e-4."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import Problem, UserError, nearest
from ..spec import NodeSpec
from ..storage.bounded_files import Unusable, parse_json
from .graph import Graph, Node

MAX_SHOWN = 80  # characters of a setting in an error message


def override(graph: Graph, settings: Sequence[str], catalogue: Mapping[str, NodeSpec]) -> Graph:
    """Return the graph with these values replaced.

    Args:
        graph: The workflow.
        settings: NODE.FIELD=VALUE, in which NODE is an id, a title or a type.
        catalogue: Node specs by type.
    Raises:
        UserError: Every setting that matches no node, several nodes, or no field.
    """
    problems: list[Problem] = []
    nodes = dict(graph.nodes)
    for setting in settings:
        target, equals, text = setting.partition("=")
        option = f"--set {setting if len(setting) <= MAX_SHOWN else f'{setting[:MAX_SHOWN]}...'}"
        name, dot, field = target.rpartition(".")
        if not equals or not dot:
            problems.append(Problem(option, "is not NODE.FIELD=VALUE; for example: LoRATrainer.steps=200"))
            continue
        matches = _find_nodes(nodes, name)
        if len(matches) != 1:
            problems.append(Problem(option, _explain_mismatch(nodes, name, matches)))
            continue
        node = matches[0]
        fields = (
            {item.name: item for item in catalogue[node.type].fields() if item.is_widget}
            if node.type in catalogue
            else {}
        )
        if node.type in catalogue and field not in fields:
            is_socket = any(item.name == field for item in catalogue[node.type].fields())
            hint = nearest(field, tuple(fields)) or f"; its fields are {', '.join(fields)}"
            unknown = f"{node.type} has no field {field!r}{hint}"
            message = f"{node.type}.{field} is a connection, not a value" if is_socket else unknown
            problems.append(Problem(option, message))
            continue
        kind = fields[field].kind if field in fields else None
        try:
            value = text if kind is str else _parse_value(text)
        except Unusable as error:
            problems.append(Problem(option, f"{error}; write a number, true, false or a text"))
            continue
        nodes[node.id] = replace(node, inputs={**node.inputs, field: value})
    if problems:
        raise UserError(problems)
    return replace(graph, nodes=nodes)


def _find_nodes(nodes: Mapping[str, Node], name: str) -> list[Node]:
    for key in ("id", "title", "type"):
        matches = [node for node in nodes.values() if getattr(node, key) == name]
        if matches:
            return matches
    return []


def _explain_mismatch(nodes: Mapping[str, Node], name: str, matches: list[Node]) -> str:
    if matches:
        return f"{name!r} matches {len(matches)} nodes; use one of the ids {', '.join(node.id for node in matches)}"
    names = [*{node.type for node in nodes.values()}, *{node.title for node in nodes.values()}]
    hint = (
        nearest(name, names) or f"; the node types are {', '.join(dict.fromkeys(node.type for node in nodes.values()))}"
    )
    return f"there is no node {name[:MAX_SHOWN]!r}{hint}"


def _parse_value(text: str) -> Any:
    """Parse JSON, or True/False as in Python; any other text is returned as it is.

    Raises:
        Unusable: It is JSON with a number that is too long, or nested too deeply.
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return parse_json(text, finite=False)
    except Unusable as error:
        if not isinstance(error.__cause__, json.JSONDecodeError):
            raise
    try:
        return float(text)
    except ValueError:
        return text
