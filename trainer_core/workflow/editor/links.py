"""Find the real source of a link on the canvas: through reroutes, bypassed nodes, primitives and subgraph boundaries.

The rules are those that the web page uses to build its prompt (frontend 1.35 to 1.49).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import Problem
from ..graph import Link
from .graph_json import BYPASS, INPUT_NODE, NEVER, Canvas, CanvasLink, CanvasNode, Slot

REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
SETTER, GETTER = "SetNode", "GetNode"  # of a widely used pack: an invisible link, by name
NOTES = ("Note", "MarkdownNote")
VIRTUAL = (REROUTE, PRIMITIVE, SETTER, GETTER, *NOTES)  # exist only in the editor


@dataclass(frozen=True)
class Constant:
    """A value instead of a link."""

    value: Any


@dataclass(frozen=True)
class Scope:
    """One canvas in context: the main graph, or one instance of a subgraph definition.

    Attributes:
        canvas: The main graph or the definition.
        prefix: Prefix of the ids in it, "" or "instance:".
        instance: The node that is the instance.
        outer: The scope that contains the instance.
        promoted: Input of the definition -> the value set on the instance.
        inner: (node id, widget) of the definition -> the value set on the instance.
        children: Instance id -> its scope.
    """

    canvas: Canvas
    prefix: str = ""
    instance: CanvasNode | None = None
    outer: Scope | None = None
    promoted: Mapping[str, Any] = field(default_factory=dict)
    inner: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    children: dict[str, Scope] = field(default_factory=dict)


@dataclass(frozen=True)
class Hop:
    """Continue from this link.

    Attributes:
        scope: The scope of the link.
        link: Id of the link.
        wanted: Type of the input at the far end.
    """

    scope: Scope
    link: str
    wanted: str


Source = Link | Constant | Problem | None


def source_of(scope: Scope, slot: Slot) -> Source:
    """Return the source of an input.

    None means that there is none, so that a widget uses its own value. A Problem is not assigned to a node yet.
    """
    visited: set[tuple[str, str]] = set()
    source: Source | Hop = Hop(scope, slot.link, slot.type)
    while isinstance(source, Hop):
        if not source.link:
            return None
        if (source.scope.prefix, source.link) in visited:
            message = "is fed by a cycle of reroutes, bypassed nodes or subgraphs; remove one of its links"
            return Problem(slot.name, message)
        visited.add((source.scope.prefix, source.link))
        source = _follow(source, slot.name)
    return source


def _follow(hop: Hop, name: str) -> Source | Hop:
    """Follow one link backwards."""
    scope = hop.scope
    link = scope.canvas.links.get(hop.link)
    if link is None:
        return Problem(name, f"is fed by link {hop.link}, which is not in the workflow; connect it again")
    if link.origin == INPUT_NODE and scope.outer and scope.instance:
        return _leave_subgraph(scope, scope.outer, scope.instance, link, hop.wanted)
    origin = scope.canvas.nodes.get(link.origin)
    if origin is None:
        missing = scope.prefix + link.origin
        return Problem(name, f"is connected to node {missing}, which is not in the workflow; connect it again")
    return _follow_output(scope, origin, link.origin_slot, hop.wanted)


def _leave_subgraph(
    scope: Scope, outer: Scope, instance: CanvasNode, link: CanvasLink, input_type: str
) -> Source | Hop:
    """Follow a link out of a subgraph: to the link of its instance, or else to the value set there."""
    inputs = scope.canvas.inputs
    name = inputs[link.origin_slot].name if 0 <= link.origin_slot < len(inputs) else ""
    outside = next((slot for slot in instance.inputs if slot.name == name), None)
    if outside and outside.link:
        return Hop(outer, outside.link, input_type)
    return Constant(scope.promoted[name]) if name in scope.promoted else None


def _follow_output(scope: Scope, node: CanvasNode, position: int, input_type: str) -> Source | Hop:
    """Return the source behind an output, or the link to continue from."""
    if node.type == PRIMITIVE:
        value = scope.inner.get((node.id, "value"), node.first_value)
        return None if value is None else Constant(value)
    if node.type in NOTES or node.mode == NEVER:
        return None
    if node.mode == BYPASS:
        bypass_input = _find_bypass_input(node, position, input_type)
        return Hop(scope, bypass_input.link, bypass_input.type) if bypass_input else None
    if node.type == GETTER:
        return _follow_getter(scope, node.first_value, input_type)
    if node.type in (REROUTE, SETTER):
        return Hop(scope, node.inputs[0].link, input_type) if node.inputs else None
    if node.id in scope.children:
        inside = scope.children[node.id]
        return Hop(inside, inside.canvas.endings.get(position, ""), input_type)
    return Link(scope.prefix + node.id, position)


def _find_bypass_input(node: CanvasNode, position: int, input_type: str) -> Slot | None:
    """Return the input that a bypassed node passes on to an output.

    It is the input at the same position if the types match, otherwise one of the same type, otherwise one that fits.
    """
    inputs = node.inputs
    opposite = inputs[position] if 0 <= position < len(inputs) else None
    if input_type == "*":
        return opposite or next(iter(inputs), None)
    output_type = node.outputs[position] if 0 <= position < len(node.outputs) else "*"
    fitting = [slot for slot in inputs if _types_match(slot.type, output_type) and _types_match(slot.type, input_type)]
    if opposite in fitting:
        return opposite
    same = [slot for slot in inputs if slot.type == input_type]
    return next(iter([*same, *fitting]), None)


def _types_match(one: str, other: str) -> bool:
    """Compare types, ignoring case; "*" matches everything, "A,B" either type."""
    left, right = set(one.lower().split(",")), set(other.lower().split(","))
    return "*" in left | right or bool(left & right)


def _follow_getter(scope: Scope | None, name: Any, input_type: str) -> Hop | None:
    """Return the link of the SetNode with this name, on this canvas or an outer one."""
    while scope:
        for node in scope.canvas.nodes.values():
            if node.type == SETTER and node.inputs and name is not None and node.first_value == name:
                return Hop(scope, node.inputs[0].link, input_type)
        scope = scope.outer
    return None
