"""Read and write ComfyUI's API format: {id: {"class_type", "inputs", "_meta"}}, in which a link is ["id", slot]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import Problem, UserError
from .graph import Graph, Link, Node, Schema


def looks_like_api(data: Any) -> bool:
    """Return whether this is an object with at least one node in it."""
    return isinstance(data, dict) and any(isinstance(node, dict) and "class_type" in node for node in data.values())


def graph_from_api(data: Mapping[str, Any], schemas: Mapping[str, Schema], where: str) -> Graph:
    """Return the graph.

    Raises:
        UserError: Every entry that is not a node, and every link to a node that does not exist.
    """
    problems: list[Problem] = []
    nodes: dict[str, Node] = {}
    for node_id, entry in data.items():
        node = _parse_node(node_id, entry, schemas, problems, where)
        if node:
            nodes[node_id] = node
            problems += [
                Problem(name, f"is connected to node {value.node}, which is not in the workflow; connect it again").at(
                    node_id, node.type
                )
                for name, value in node.inputs.items()
                if isinstance(value, Link) and value.node not in data
            ]
    if problems:
        raise UserError(problems)
    return Graph(nodes, "api")


def _parse_node(
    node_id: str, entry: Any, schemas: Mapping[str, Schema], problems: list[Problem], where: str
) -> Node | None:
    node_type = entry.get("class_type") if isinstance(entry, dict) else None
    if not isinstance(node_type, str):
        problems.append(
            Problem(where, f'entry "{node_id}" is not a node: it has no "class_type"; export the workflow again')
        )
        return None
    inputs = entry.get("inputs", {})
    if not isinstance(inputs, dict):
        message = "is not an object of names and values; export the workflow again"
        problems.append(Problem("inputs", message, node_id, node_type))
        return None
    meta = entry.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    if not title or not isinstance(title, str):
        title = schemas[node_type].title if node_type in schemas else node_type
    return Node(node_id, node_type, title, {name: _parse_value(value) for name, value in inputs.items()})


def _parse_value(value: Any) -> Any:
    """Convert links to Link. The web page wraps values that are lists, so that they are not mistaken for links."""
    if isinstance(value, list) and len(value) == 2 and _is_id(value[0]) and _is_slot(value[1]):
        return Link(str(value[0]), int(value[1]))
    if isinstance(value, dict) and "__value__" in value:
        return value["__value__"]
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _is_slot(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def api_from_graph(graph: Graph) -> dict[str, dict[str, Any]]:
    """Return the graph as ComfyUI's server accepts it."""
    return {
        node.id: {
            "inputs": {name: _dump_value(value) for name, value in node.inputs.items()},
            "class_type": node.type,
            "_meta": {"title": node.title},
        }
        for node in graph.nodes.values()
    }


def _dump_value(value: Any) -> Any:
    if isinstance(value, Link):
        return [value.node, value.slot]
    return {"__value__": value} if isinstance(value, list) else value
