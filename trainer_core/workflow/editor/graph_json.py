"""Parse and validate the editor's own JSON: nodes with slots, links by id, subgraph definitions.

Version 0.4 stores a link as a list, version 1.0 and every subgraph as an object. Ids are numbers or strings; here all
are strings.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import Problem

INPUT_NODE, OUTPUT_NODE = "-10", "-20"  # ids of the input and output of a subgraph
NEVER, BYPASS = 2, 4  # values of a node's mode
AGAIN = "export the workflow again"


@dataclass(frozen=True)
class Slot:
    """An input of a node.

    Attributes:
        name: Its name.
        type: Its type.
        link: Id of its link, or "".
        widget: Name of the widget that it replaces, or "".
    """

    name: str
    type: str
    link: str = ""
    widget: str = ""


@dataclass(frozen=True)
class CanvasLink:
    """A link from an output to an input, by position."""

    origin: str
    origin_slot: int
    target: str
    target_slot: int


@dataclass(frozen=True)
class CanvasNode:
    """A node on the canvas.

    Attributes:
        id: As a string.
        type: The node class, or the id of a subgraph definition.
        title: As the user named it, or "".
        mode: See NEVER and BYPASS.
        inputs: In order.
        outputs: Types, in order.
        values: `widgets_values`, by position or, for some packs, by name.
        named: The same by name, if the editor was recent enough to save it.
        proxies: Of a subgraph's instance: the (inner node or "-1", widget) that each position of `values` stands for.
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
    """The main graph, or a subgraph definition.

    Attributes:
        name: Name of the subgraph.
        nodes: Nodes by id.
        links: Links by id.
        inputs: Inputs of a definition, in order.
        endings: Output slot of a definition -> the link that feeds it.
    """

    name: str
    nodes: Mapping[str, CanvasNode]
    links: Mapping[str, CanvasLink]
    inputs: tuple[Slot, ...] = ()
    endings: Mapping[int, str] = field(default_factory=dict)


def parse_document(data: Mapping[str, Any], problems: list[Problem], where: str) -> tuple[Canvas, dict[str, Canvas]]:
    """Return the main canvas, and the subgraph definitions by id. Problems are appended to `problems`."""
    definitions_entry = data.get("definitions")
    subgraphs = definitions_entry.get("subgraphs") if isinstance(definitions_entry, dict) else None
    definitions: dict[str, Canvas] = {}
    for entry in subgraphs if isinstance(subgraphs, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("nodes"), list) and _is_id(entry.get("id")):
            definitions[str(entry["id"])] = _parse_canvas(entry, problems, where)
        else:
            problems.append(Problem(where, f"has a subgraph without an id or nodes: {_shorten(entry)}; {AGAIN}"))
    return _parse_canvas(data, problems, where), definitions


def _parse_canvas(data: Mapping[str, Any], problems: list[Problem], where: str) -> Canvas:
    nodes: dict[str, CanvasNode] = {}
    for entry in data["nodes"]:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("type"), str):
            problems.append(Problem(where, f"has a node without an id or type: {_shorten(entry)}; {AGAIN}"))
            continue
        node = _parse_node(entry)
        if node.id in nodes:
            types = f"{nodes[node.id].type} and {node.type}"
            problems.append(Problem(where, f"has two nodes with the id {node.id}: {types}; {AGAIN}"))
        nodes[node.id] = node
    links: dict[str, CanvasLink] = {}
    for entry in _list_entries(data.get("links")):
        pair = _parse_link(entry)
        if pair is None:
            problems.append(Problem(where, f"has a link that can't be read: {_shorten(entry)}; {AGAIN}"))
        else:
            links[pair[0]] = pair[1]
    endings = {link.target_slot: link_id for link_id, link in links.items() if link.target == OUTPUT_NODE}
    return Canvas(_text(data.get("name")), nodes, links, _parse_slots(data.get("inputs")), endings)


def _parse_node(entry: Mapping[str, Any]) -> CanvasNode:
    properties = entry.get("properties")
    values, named = entry.get("widgets_values"), entry.get("widgets_values_named")
    return CanvasNode(
        id=str(entry["id"]),
        type=entry["type"],
        title=_text(entry.get("title")),
        mode=entry["mode"] if isinstance(entry.get("mode"), int) else 0,
        inputs=_parse_slots(entry.get("inputs")),
        outputs=tuple(slot.type for slot in _parse_slots(entry.get("outputs"))),
        values=values if isinstance(values, (list, dict)) else [],
        named=named if isinstance(named, dict) else {},
        proxies=_parse_proxies(properties.get("proxyWidgets")) if isinstance(properties, dict) else (),
    )


def _parse_slots(entries: Any) -> tuple[Slot, ...]:
    return tuple(_parse_slot(entry if isinstance(entry, dict) else {}) for entry in _list_entries(entries))


def _parse_slot(entry: Mapping[str, Any]) -> Slot:
    widget, link = entry.get("widget"), entry.get("link")
    return Slot(
        name=_text(entry.get("name")),
        type=_parse_type(entry.get("type")),
        link=str(link) if _is_id(link) else "",
        widget=_text(widget.get("name")) if isinstance(widget, dict) else "",
    )


def _parse_type(value: Any) -> str:
    """Return the type. Old combos store their options as the type; a number means any type."""
    if isinstance(value, str):
        return value or "*"
    return "COMBO" if isinstance(value, list) else "*"


def _parse_link(entry: Any) -> tuple[str, CanvasLink] | None:
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


def _parse_proxies(entries: Any) -> tuple[tuple[str, str], ...]:
    pairs = entries if isinstance(entries, list) else []
    return tuple((str(pair[0]), str(pair[1])) for pair in pairs if isinstance(pair, list) and len(pair) >= 2)


def _list_entries(value: Any) -> list[Any]:
    """Return the entries of a list. Some versions save slots and links as objects with numeric keys."""
    entries = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [entry for entry in entries if entry is not None]


def _is_id(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _shorten(value: Any) -> str:
    return reprlib.repr(value)
