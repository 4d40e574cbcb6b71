"""Where a line on the canvas really comes from: through reroutes, bypassed nodes, primitives and the ends of subgraphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..problems import Problem
from .canvas import BYPASS, INPUT_NODE, NEVER, Canvas, CanvasLink, CanvasNode, Slot
from .graph import Link

REROUTE, PRIMITIVE, SETTER, GETTER = "Reroute", "PrimitiveNode", "SetNode", "GetNode"
NOTES = ("Note", "MarkdownNote")
VIRTUAL = (REROUTE, PRIMITIVE, SETTER, GETTER, *NOTES)  # live in the editor only


@dataclass(frozen=True)
class Constant:
    """A value instead of a link."""

    value: Any


@dataclass(frozen=True)
class Muted:
    """The line comes from a node that is switched off, and the input goes with it, its widget's value too."""


@dataclass(frozen=True)
class Scope:
    """One canvas in its place: the main one, or a definition as one instance of it shows it.

    Args:
        prefix: "" or "instance:", of the ids in it.
        outer: the scope that the instance lies in.
        promoted: input of the instance -> the value set on the instance.
        inner: (node id, widget) -> the value set on the instance.
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
class _Hop:
    """Go on from this link. wanted: the type at the far end."""

    scope: Scope
    link: str
    wanted: str


Source = Link | Constant | Muted | Problem | None


def source_of(scope: Scope, slot: Slot) -> Source:
    """What feeds an input. None: nothing does, so that a widget keeps its own value. A Problem is not yet placed on a node."""
    seen: set[tuple[str, str]] = set()
    found: Source | _Hop = _Hop(scope, slot.link, slot.type)
    while isinstance(found, _Hop):
        if not found.link:
            return None
        if (found.scope.prefix, found.link) in seen:
            return Problem(slot.name, "is fed by a circle of reroutes, bypassed nodes or subgraphs; take one of its links away")
        seen.add((found.scope.prefix, found.link))
        found = _follow(found, slot.name)
    return found


def _follow(hop: _Hop, name: str) -> Source | _Hop:
    """One link backwards."""
    scope = hop.scope
    link = scope.canvas.links.get(hop.link)
    if link is None:
        return Problem(name, f"is connected by link {hop.link}, which the workflow does not have; connect it again")
    if link.origin == INPUT_NODE and scope.outer and scope.instance:
        return _leave(scope, scope.outer, scope.instance, link, hop.wanted)
    origin = scope.canvas.nodes.get(link.origin)
    if origin is None:
        return Problem(name, f"comes from node {scope.prefix}{link.origin}, which the workflow does not have; connect it again")
    return _end(scope, origin, link.origin_slot, hop.wanted)


def _leave(scope: Scope, outer: Scope, instance: CanvasNode, link: CanvasLink, wanted: str) -> Source | _Hop:
    """Up and out of a subgraph: to what is connected to its instance, else to the value set there."""
    inputs = scope.canvas.inputs
    name = inputs[link.origin_slot].name if link.origin_slot < len(inputs) else ""
    outside = next((slot for slot in instance.inputs if slot.name == name), None)
    if outside and outside.link:
        return _Hop(outer, outside.link, wanted)
    return Constant(scope.promoted[name]) if name in scope.promoted else None


def _end(scope: Scope, origin: CanvasNode, position: int, wanted: str) -> Source | _Hop:
    """What an output gives; or the link to go on from."""
    if origin.mode == BYPASS:
        passed = _bypass(origin, position, wanted)
        return _Hop(scope, passed.link, passed.type) if passed else None
    if origin.type == PRIMITIVE:
        return Constant(origin.values[0]) if isinstance(origin.values, list) and origin.values else None
    if origin.type in (REROUTE, SETTER, GETTER):
        passing = _setter(scope, origin) if origin.type == GETTER else origin
        return _Hop(scope, passing.inputs[0].link, wanted) if passing and passing.inputs else None
    if origin.type in NOTES:
        return None
    if origin.mode == NEVER:
        return Muted()
    if origin.id in scope.children:  # down into a subgraph
        inside = scope.children[origin.id]
        return _Hop(inside, inside.canvas.endings.get(position, ""), wanted)
    return Link(scope.prefix + origin.id, position)


def _bypass(node: CanvasNode, position: int, wanted: str) -> Slot | None:
    """The input that stands in for an output: the same slot if types agree, else the first of the same type, else the first that fits."""
    inputs = node.inputs
    if wanted == "*":
        return inputs[position] if position < len(inputs) else inputs[0] if inputs else None
    given = node.outputs[position] if position < len(node.outputs) else "*"
    if position < len(inputs) and _fits(inputs[position].type, given) and _fits(inputs[position].type, wanted):
        return inputs[position]
    same = [slot for slot in inputs if slot.type == wanted]
    return next(iter(same or [slot for slot in inputs if _fits(slot.type, given) and _fits(slot.type, wanted)]), None)


def _fits(one: str, other: str) -> bool:
    """Types are compared without case; "*" fits all, "A,B" either."""
    left, right = set(one.lower().split(",")), set(other.lower().split(","))
    return "*" in left | right or bool(left & right)


def _setter(scope: Scope, getter: CanvasNode) -> CanvasNode | None:
    """The SetNode of the name that a GetNode gives (of a widely used pack)."""
    wanted = getter.values[0] if isinstance(getter.values, list) and getter.values else None
    found = (n for n in scope.canvas.nodes.values() if n.type == SETTER and isinstance(n.values, list) and n.values[:1] == [wanted])
    return next(found, None)
