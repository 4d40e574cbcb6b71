"""The editor's own JSON, parsed and checked: nodes with slots, links by id, subgraph definitions.

Version 0.4 keeps a link as a list, 1.0 and every subgraph as an object; ids are numbers or texts. Here all are texts.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import Problem

INPUT_NODE, OUTPUT_NODE = "-10", "-20"  # the two ends of a subgraph
NEVER, BYPASS = 2, 4  # modes of a node
AGAIN = "export the workflow again"


@dataclass(frozen=True)
class Slot:
    """An input. link: its id, or ""; widget: name of the widget that it stands for, or ""."""

    name: str
    type: str
    link: str = ""
    widget: str = ""


@dataclass(frozen=True)
class CanvasLink:
    """A line from an output to an input, by position."""

    origin: str
    origin_slot: int
    target: str
    target_slot: int


@dataclass(frozen=True)
class CanvasNode:
    """A node as it lies on the canvas.

    Args:
        outputs: types, in order.
        values: `widgets_values`, by position or, of some packs, by name.
        named: the same by name, where the editor was recent enough to save it.
        proxies: of a subgraph's instance: (inner node or "-1", widget) that the positions of values stand for.
    """

    id: str
    type: str
    title: str
    mode: int
    inputs: tuple[Slot, ...]
    outputs: tuple[str, ...]
    values: list[Any] | dict[str, Any]
    named: Mapping[str, Any] = field(default_factory=dict)
    proxies: tuple[tuple[str, str], ...] = ()

    @property
    def first_value(self) -> Any:
        return self.values[0] if isinstance(self.values, list) and self.values else None


@dataclass(frozen=True)
class Canvas:
    """A graph, or a subgraph's definition with its ends.

    Args:
        inputs: of a definition, in order.
        endings: output slot of a definition -> the link that feeds it.
    """

    name: str
    nodes: Mapping[str, CanvasNode]
    links: Mapping[str, CanvasLink]
    inputs: tuple[Slot, ...] = ()
    endings: Mapping[int, str] = field(default_factory=dict)


def parse_document(data: Mapping[str, Any], problems: list[Problem], where: str) -> tuple[Canvas, dict[str, Canvas]]:
    """The main canvas, and the subgraph definitions by id. Faults are added to problems."""
    listed = data.get("definitions")
    subgraphs = listed.get("subgraphs") if isinstance(listed, dict) else None
    definitions: dict[str, Canvas] = {}
    for entry in subgraphs if isinstance(subgraphs, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("nodes"), list) and _is_id(entry.get("id")):
            definitions[str(entry["id"])] = _canvas(entry, problems, where)
        else:
            problems.append(Problem(where, f"has a subgraph without id or nodes: {_shorten(entry)}; {AGAIN}"))
    return _canvas(data, problems, where), definitions


def _canvas(data: Mapping[str, Any], problems: list[Problem], where: str) -> Canvas:
    nodes: dict[str, CanvasNode] = {}
    for entry in data["nodes"]:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("type"), str):
            problems.append(Problem(where, f"has a node without id or type: {_shorten(entry)}; {AGAIN}"))
            continue
        node = _node(entry)
        if node.id in nodes:
            types = f"{nodes[node.id].type} and {node.type}"
            problems.append(Problem(where, f"has two nodes with the id {node.id}: {types}; {AGAIN}"))
        nodes[node.id] = node
    links: dict[str, CanvasLink] = {}
    for entry in _entries(data.get("links")):
        pair = _link(entry)
        if pair is None:
            problems.append(Problem(where, f"has a link that can't be read: {_shorten(entry)}; {AGAIN}"))
        else:
            links[pair[0]] = pair[1]
    endings = {link.target_slot: link_id for link_id, link in links.items() if link.target == OUTPUT_NODE}
    return Canvas(_text(data.get("name")), nodes, links, _slots(data.get("inputs")), endings)


def _node(entry: Mapping[str, Any]) -> CanvasNode:
    properties = entry.get("properties")
    values, named = entry.get("widgets_values"), entry.get("widgets_values_named")
    return CanvasNode(
        id=str(entry["id"]),
        type=entry["type"],
        title=_text(entry.get("title")),
        mode=entry["mode"] if isinstance(entry.get("mode"), int) else 0,
        inputs=_slots(entry.get("inputs")),
        outputs=tuple(slot.type for slot in _slots(entry.get("outputs"))),
        values=values if isinstance(values, (list, dict)) else [],
        named=named if isinstance(named, dict) else {},
        proxies=_proxies(properties.get("proxyWidgets")) if isinstance(properties, dict) else (),
    )


def _slots(entries: Any) -> tuple[Slot, ...]:
    return tuple(_slot(entry if isinstance(entry, dict) else {}) for entry in _entries(entries))


def _slot(entry: Mapping[str, Any]) -> Slot:
    widget, link = entry.get("widget"), entry.get("link")
    return Slot(
        name=_text(entry.get("name")),
        type=_type(entry.get("type")),
        link=str(link) if _is_id(link) else "",
        widget=_text(widget.get("name")) if isinstance(widget, dict) else "",
    )


def _type(value: Any) -> str:
    """Old combos have their options for a type; a number means any."""
    if isinstance(value, str):
        return value or "*"
    return "COMBO" if isinstance(value, list) else "*"


def _link(entry: Any) -> tuple[str, CanvasLink] | None:
    if isinstance(entry, list):
        parts = entry[:5]
    else:
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
        parts = [entry.get(name) for name in names] if isinstance(entry, dict) else []
    if len(parts) < 5 or not all(_is_id(part) for part in parts):
        return None
    link_id, origin, origin_slot, target, target_slot = (str(part) for part in parts)
    try:
        return link_id, CanvasLink(origin, int(origin_slot), target, int(target_slot))
    except ValueError:
        return None


def _proxies(entries: Any) -> tuple[tuple[str, str], ...]:
    pairs = entries if isinstance(entries, list) else []
    return tuple((str(pair[0]), str(pair[1])) for pair in pairs if isinstance(pair, list) and len(pair) >= 2)


def _entries(value: Any) -> list[Any]:
    """Some versions keep slots and links as objects with numbers for keys."""
    listed = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [entry for entry in listed if entry is not None]


def _is_id(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _shorten(value: Any) -> str:
    return reprlib.repr(value)
