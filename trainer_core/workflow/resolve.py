"""Resolve a node's named values: follow links, check types, and assign every problem to its node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import Problem, nearest
from ..spec import NodeSpec
from .graph import Graph, Link, Node

LITERALS = {"PrimitiveInt", "PrimitiveFloat", "PrimitiveString", "PrimitiveStringMultiline", "PrimitiveBoolean"}
# None of 1,156 node types of ComfyUI and its templates is this similar to one of ours; at 0.6 KSampler is.
MISSPELT = 0.85
SOCKET_KINDS = {"INT": (int,), "FLOAT": (int, float), "STRING": (str,), "BOOLEAN": (bool,)}


class _Pending:
    """The value of an output that does not exist yet, because its node has not run or can't run."""

    def __repr__(self) -> str:
        return "(not known yet)"


PENDING = _Pending()


@dataclass
class Resolved:
    """Values of one node.

    Attributes:
        values: Value by field name.
        problems: Problems of the node's connections.
        complete: Whether no value is pending, so that the node can run.
        is_stored: Whether values come from nodes that only run in ComfyUI, so that an earlier run there must have
            stored the outputs. These values are PENDING, and the node needs none of them.
    """

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    complete: bool = True
    is_stored: bool = False


def resolve(
    node: Node, graph: Graph, catalogue: Mapping[str, NodeSpec], outputs: Mapping[str, tuple[Any, ...]]
) -> Resolved:
    """Return the named values of a node in the catalogue.

    A pending value on a socket is returned as PENDING. On a widget it is left out, so that other fields can be checked.

    Args:
        node: The node.
        graph: The workflow.
        catalogue: Node specs by type.
        outputs: Outputs of the nodes that ran, by node id. Missing ones are PENDING.
    """
    spec = catalogue[node.type]
    sockets = {item.name: item.socket.type for item in spec.fields() if item.socket}
    storable = {item.name for item in spec.fields() if item.each and spec.stored}
    resolved = Resolved()
    for name, raw in node.inputs.items():
        socket_type = sockets.get(name, "")
        if isinstance(raw, Link) and name in storable and is_foreign(raw, graph, catalogue):
            resolved.values[name], resolved.is_stored = PENDING, True
        elif isinstance(raw, Link):
            value, problem = _follow(raw, name, socket_type, graph, catalogue, outputs)
            resolved.problems.extend([problem] if problem else [])
            resolved.complete = resolved.complete and value is not PENDING
            if value is not PENDING or socket_type:
                resolved.values[name] = value
        elif socket_type:
            resolved.problems.append(Problem(name, f"needs a connection of type {socket_type}, not a value"))
        else:
            resolved.values[name] = raw
    return resolved


def _follow(
    link: Link,
    name: str,
    socket_type: str,
    graph: Graph,
    catalogue: Mapping[str, NodeSpec],
    outputs: Mapping[str, tuple[Any, ...]],
) -> tuple[Any, Problem | None]:
    link = _skip_literals(link, graph)
    source = graph.nodes[link.node]
    if source.type in LITERALS and not socket_type:
        return source.inputs.get("value"), None
    if is_misspelt(source.type, catalogue):
        return PENDING, None  # already reported
    if source.type not in catalogue:
        fix = f"connect an output of type {socket_type}" if socket_type else "enter the value directly"
        return PENDING, Problem(
            name, f"is connected to node {source.id} ({source.type}), which can only run in ComfyUI; {fix}"
        )
    offered = catalogue[source.type].outputs
    if not 0 <= link.slot < len(offered):
        return PENDING, Problem(
            name,
            f"is connected to output {link.slot} of node {source.id} ({source.type}), "
            f"which has only {len(offered)}; connect it again",
        )
    output_type = offered[link.slot].type
    if socket_type and output_type != socket_type:
        candidates = [
            f"{spec.id}.{output.name}"
            for spec in catalogue.values()
            for output in spec.outputs
            if output.type == socket_type
        ]
        return PENDING, Problem(
            name,
            f"receives {output_type} from node {source.id} ({source.type}), but needs {socket_type}; "
            f"connect {' or '.join(candidates)}",
        )
    if not socket_type and output_type not in SOCKET_KINDS:
        return PENDING, Problem(
            name,
            f"receives {output_type} from node {source.id} ({source.type}), which is not a value for a widget; "
            "disconnect it",
        )
    values = outputs.get(source.id)
    return (values[link.slot] if values else PENDING), None


def is_foreign(link: Link, graph: Graph, catalogue: Mapping[str, NodeSpec]) -> bool:
    """Return whether a link comes from a node that only runs in ComfyUI."""
    source = graph.nodes[_skip_literals(link, graph).node]
    return not (source.type in catalogue or source.type in LITERALS or is_misspelt(source.type, catalogue))


def _skip_literals(link: Link, graph: Graph) -> Link:
    """Follow a link through literal nodes, whose own value may be linked."""
    visited: set[str] = set()
    source = graph.nodes[link.node]
    while source.type in LITERALS and source.id not in visited and isinstance(source.inputs.get("value"), Link):
        visited.add(source.id)
        link = source.inputs["value"]
        source = graph.nodes[link.node]
    return link


def unknown_types(graph: Graph, catalogue: Mapping[str, NodeSpec]) -> list[Problem]:
    """Return a problem for each node type that looks like a misspelling of one of ours.

    Other unknown types are left to ComfyUI.
    """
    problems = []
    for node in graph.nodes.values():
        if is_misspelt(node.type, catalogue):
            hint = nearest(node.type, tuple(catalogue), MISSPELT)
            problems.append(Problem("", f"there is no node of type {node.type!r}{hint}", node.id, node.type))
    return problems


def is_misspelt(node_type: str, catalogue: Mapping[str, NodeSpec]) -> bool:
    return node_type not in catalogue and bool(nearest(node_type, tuple(catalogue), MISSPELT))
