"""Where a line on the canvas really comes from: through reroutes, bypassed nodes, primitives and the ends of subgraphs.

The rules are those by which the page makes its prompt (front ends 1.35 to 1.49).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import Problem
from ..graph import Link
from .graph_json import BYPASS, INPUT_NODE, NEVER, Canvas, CanvasLink, CanvasNode, Slot

REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
SETTER, GETTER = "SetNode", "GetNode"  # of a widely used pack: a line without a line, by name
NOTES = ("Note", "MarkdownNote")
VIRTUAL = (REROUTE, PRIMITIVE, SETTER, GETTER, *NOTES)  # live in the editor only


@dataclass(frozen=True)
class Constant:
    """A value instead of a link."""

    value: Any


@dataclass(frozen=True)
class Scope:
    """One canvas in its place: the main one, or a definition as one instance of it shows it.

    Args:
        prefix: of the ids in it, "" or "instance:".
        outer: the scope that the instance lies in.
        promoted: input of the definition -> the value set on the instance.
        inner: (node id, widget) of the definition -> the value set on the instance.
        children: instance id -> its scope.
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
    """Go on from this link. wanted: the type at the far end."""

    scope: Scope
    link: str
    wanted: str


Source = Link | Constant | Problem | None


def source_of(scope: Scope, slot: Slot) -> Source:
    """What feeds an input. None: nothing does, so that a widget keeps its own value; a Problem is not yet on a node."""
    seen: set[tuple[str, str]] = set()
    found: Source | Hop = Hop(scope, slot.link, slot.type)
    while isinstance(found, Hop):
        if not found.link:
            return None
        if (found.scope.prefix, found.link) in seen:
            circle = "is fed by a circle of reroutes, bypassed nodes or subgraphs; take one of its links away"
            return Problem(slot.name, circle)
        seen.add((found.scope.prefix, found.link))
        found = _follow(found, slot.name)
    return found


def _follow(hop: Hop, name: str) -> Source | Hop:
    """One link backwards."""
    scope = hop.scope
    link = scope.canvas.links.get(hop.link)
    if link is None:
        return Problem(name, f"is fed by link {hop.link}, which the workflow does not have; connect it again")
    if link.origin == INPUT_NODE and scope.outer and scope.instance:
        return _leave(scope, scope.outer, scope.instance, link, hop.wanted)
    origin = scope.canvas.nodes.get(link.origin)
    if origin is None:
        missing = scope.prefix + link.origin
        return Problem(name, f"comes from node {missing}, which the workflow does not have; connect it again")
    return _pass(scope, origin, link.origin_slot, hop.wanted)


def _leave(scope: Scope, outer: Scope, instance: CanvasNode, link: CanvasLink, wanted: str) -> Source | Hop:
    """Up and out of a subgraph: to what is connected to its instance, else to the value set there."""
    inputs = scope.canvas.inputs
    name = inputs[link.origin_slot].name if 0 <= link.origin_slot < len(inputs) else ""
    outside = next((slot for slot in instance.inputs if slot.name == name), None)
    if outside and outside.link:
        return Hop(outer, outside.link, wanted)
    return Constant(scope.promoted[name]) if name in scope.promoted else None


def _pass(scope: Scope, node: CanvasNode, position: int, wanted: str) -> Source | Hop:
    """What an output gives, or the link to go on from."""
    if node.type == PRIMITIVE:
        value = scope.inner.get((node.id, "value"), node.first_value)
        return None if value is None else Constant(value)
    if node.type in NOTES or node.mode == NEVER:
        return None
    if node.mode == BYPASS:
        stand_in = _stand_in(node, position, wanted)
        return Hop(scope, stand_in.link, stand_in.type) if stand_in else None
    if node.type == GETTER:
        return _from_setter(scope, node.first_value, wanted)
    if node.type in (REROUTE, SETTER):
        return Hop(scope, node.inputs[0].link, wanted) if node.inputs else None
    if node.id in scope.children:
        inside = scope.children[node.id]
        return Hop(inside, inside.canvas.endings.get(position, ""), wanted)
    return Link(scope.prefix + node.id, position)


def _stand_in(node: CanvasNode, position: int, wanted: str) -> Slot | None:
    """A bypassed node's input for its output: same position if types agree, else same type, else one that fits."""
    inputs = node.inputs
    opposite = inputs[position] if 0 <= position < len(inputs) else None
    if wanted == "*":
        return opposite or next(iter(inputs), None)
    given = node.outputs[position] if 0 <= position < len(node.outputs) else "*"
    fitting = [slot for slot in inputs if _fits(slot.type, given) and _fits(slot.type, wanted)]
    if opposite in fitting:
        return opposite
    same = [slot for slot in inputs if slot.type == wanted]
    return next(iter([*same, *fitting]), None)


def _fits(one: str, other: str) -> bool:
    """Types are compared without case; "*" fits all, "A,B" either."""
    left, right = set(one.lower().split(",")), set(other.lower().split(","))
    return "*" in left | right or bool(left & right)


def _from_setter(scope: Scope | None, name: Any, wanted: str) -> Hop | None:
    """From the SetNode of this name, on this canvas or further out."""
    while scope:
        for node in scope.canvas.nodes.values():
            if node.type == SETTER and node.inputs and name is not None and node.first_value == name:
                return Hop(scope, node.inputs[0].link, wanted)
        scope = scope.outer
    return None
