"""A node's named values from the graph: links followed, types compared, every fault placed on its node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import Problem, nearest
from ..spec import NodeSpec
from .graph import Graph, Link, Node

LITERALS = {"PrimitiveInt", "PrimitiveFloat", "PrimitiveString", "PrimitiveStringMultiline", "PrimitiveBoolean"}
MISSPELT = (
    0.85  # of 1,156 types of ComfyUI's own nodes and templates none is as near to one of ours; at 0.6 KSampler is
)
SOCKET_KINDS = {"INT": (int,), "FLOAT": (int, float), "STRING": (str,), "BOOLEAN": (bool,)}


class _Pending:
    """The value of an output that does not exist yet: its node has not run, or can't."""

    def __repr__(self) -> str:
        return "(not known yet)"


PENDING = _Pending()


@dataclass
class Resolved:
    """Values of one node. complete: no value is pending, so the node can run."""

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    complete: bool = True


def resolve(
    node: Node, graph: Graph, catalogue: Mapping[str, NodeSpec], outputs: Mapping[str, tuple[Any, ...]]
) -> Resolved:
    """Named values of a node of the catalogue. outputs: of the nodes that ran; what is missing there is PENDING.

    A pending value on a socket is passed on as PENDING; one on a widget is left out, so that the other fields can be checked.
    """
    sockets = {item.name: item.socket.type for item in catalogue[node.type].fields() if item.socket}
    found = Resolved()
    for name, raw in node.inputs.items():
        wanted = sockets.get(name, "")
        if isinstance(raw, Link):
            value, problem = _follow(raw, name, wanted, graph, catalogue, outputs)
            found.problems.extend([problem] if problem else [])
            found.complete = found.complete and value is not PENDING
            if value is not PENDING or wanted:
                found.values[name] = value
        elif wanted:
            found.problems.append(Problem(name, f"wants a connection of type {wanted}, not a value"))
        else:
            found.values[name] = raw
    return found


def _follow(
    link: Link,
    name: str,
    wanted: str,
    graph: Graph,
    catalogue: Mapping[str, NodeSpec],
    outputs: Mapping[str, tuple[Any, ...]],
) -> tuple[Any, Problem | None]:
    link = _behind_literals(link, graph)
    source = graph.nodes[link.node]
    if source.type in LITERALS and not wanted:
        return source.inputs.get("value"), None
    if is_misspelt(source.type, catalogue):
        return PENDING, None  # named already
    if source.type not in catalogue:
        wants = f"connect an output of type {wanted}" if wanted else "give the value itself"
        return PENDING, Problem(
            name, f"comes from node {source.id} ({source.type}), which only ComfyUI can run; {wants}"
        )
    offered = catalogue[source.type].outputs
    if not 0 <= link.slot < len(offered):
        return PENDING, Problem(
            name,
            f"comes from output {link.slot} of node {source.id} ({source.type}), which has {len(offered)}; connect it again",
        )
    given = offered[link.slot].type
    if wanted and given != wanted:
        fits = [
            f"{spec.id}.{output.name}"
            for spec in catalogue.values()
            for output in spec.outputs
            if output.type == wanted
        ]
        return PENDING, Problem(
            name, f"gets {given} from node {source.id} ({source.type}), wants {wanted}; connect {' or '.join(fits)}"
        )
    if not wanted and given not in SOCKET_KINDS:
        return PENDING, Problem(
            name, f"gets {given} from node {source.id} ({source.type}), which is no value for a widget; disconnect it"
        )
    values = outputs.get(source.id)
    return (values[link.slot] if values else PENDING), None


def _behind_literals(link: Link, graph: Graph) -> Link:
    """A literal's own value may be linked in turn."""
    seen: set[str] = set()
    source = graph.nodes[link.node]
    while source.type in LITERALS and source.id not in seen and isinstance(source.inputs.get("value"), Link):
        seen.add(source.id)
        link = source.inputs["value"]
        source = graph.nodes[link.node]
    return link


def unknown_types(graph: Graph, catalogue: Mapping[str, NodeSpec]) -> list[Problem]:
    """Node types that look like one of ours misspelt. Other foreign types are ComfyUI's own business."""
    found = []
    for node in graph.nodes.values():
        if is_misspelt(node.type, catalogue):
            hint = nearest(node.type, tuple(catalogue), MISSPELT)
            found.append(Problem("", f"there is no node of type {node.type!r}{hint}", node.id, node.type))
    return found


def is_misspelt(node_type: str, catalogue: Mapping[str, NodeSpec]) -> bool:
    return node_type not in catalogue and bool(nearest(node_type, tuple(catalogue), MISSPELT))
