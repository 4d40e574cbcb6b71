"""The editor's own JSON, parsed and checked: nodes with slots, links by id, subgraph definitions.

Version 0.4 keeps a link as a list, 1.0 and every subgraph as an object; ids may be numbers or texts. All ids are texts here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..problems import Problem

INPUT_NODE, OUTPUT_NODE = "-10", "-20"  # the ends of a subgraph
NEVER, BYPASS = 2, 4  # modes


@dataclass(frozen=True)
class Slot:
    """An input of a node. link: id or ""; widget: name of the widget it stands for, or ""."""

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
    """A node as it lies on the canvas. outputs: types; values: `widgets_values`, a list or an object; named: values by name."""

    id: str
    type: str
    title: str
    mode: int
    inputs: tuple[Slot, ...]
    outputs: tuple[str, ...]
    values: list[Any] | dict[str, Any]
    named: Mapping[str, Any] = field(default_factory=dict)
    proxies: tuple[tuple[str, str], ...] = ()


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
    definitions: dict[str, Canvas] = {}
    listed = data.get("definitions")
    subgraphs = listed.get("subgraphs") if isinstance(listed, dict) else None
    for entry in subgraphs if isinstance(subgraphs, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("nodes"), list) and "id" in entry:
            definitions[str(entry["id"])] = _canvas(entry, problems, where)
        else:
            problems.append(Problem(where, "has a subgraph definition without id or nodes; export the workflow again"))
    return _canvas(data, problems, where), definitions


def _canvas(data: Mapping[str, Any], problems: list[Problem], where: str) -> Canvas:
    nodes: dict[str, CanvasNode] = {}
    for entry in data["nodes"]:
        node = _node(entry, problems, where)
        if node is None:
            continue
        if node.id in nodes:
            problems.append(Problem(where, f"has two nodes with the id {node.id}: {nodes[node.id].type} and {node.type}; export the workflow again"))
        nodes[node.id] = node
    links: dict[str, CanvasLink] = {}
    listed = data.get("links")
    for entry in listed if isinstance(listed, list) else list(listed.values()) if isinstance(listed, dict) else []:
        pair = _link(entry)
        if pair:
            links[pair[0]] = pair[1]
        elif entry is not None:
            problems.append(Problem(where, f"has a link that can't be read: {_short(entry)}; export the workflow again"))
    endings = {link.target_slot: link_id for link_id, link in links.items() if link.target == OUTPUT_NODE}
    return Canvas(str(data.get("name", "")), nodes, links, _slots(data.get("inputs")), endings)


def _node(entry: Any, problems: list[Problem], where: str) -> CanvasNode | None:
    if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("type"), str):
        problems.append(Problem(where, f"has a node without id or type: {_short(entry)}; export the workflow again"))
        return None
    properties = entry.get("properties") if isinstance(entry.get("properties"), dict) else {}
    values = entry.get("widgets_values")
    named = entry.get("widgets_values_named")
    return CanvasNode(
        id=str(entry["id"]),
        type=entry["type"],
        title=entry["title"] if isinstance(entry.get("title"), str) else "",
        mode=entry["mode"] if isinstance(entry.get("mode"), int) else 0,
        inputs=_slots(entry.get("inputs")),
        outputs=tuple(slot.type for slot in _slots(entry.get("outputs"))),
        values=values if isinstance(values, (list, dict)) else [],
        named=named if isinstance(named, dict) else {},
        proxies=_proxies(properties.get("proxyWidgets")),
    )


def _slots(entries: Any) -> tuple[Slot, ...]:
    return tuple(_slot(entry) for entry in entries if isinstance(entry, dict)) if isinstance(entries, list) else ()


def _slot(entry: Mapping[str, Any]) -> Slot:
    widget = entry.get("widget")
    return Slot(
        name=str(entry.get("name", "")),
        type=_type(entry.get("type")),
        link=str(entry["link"]) if _is_id(entry.get("link")) else "",
        widget=str(widget.get("name", "")) if isinstance(widget, dict) else "",
    )


def _type(value: Any) -> str:
    """Old combos have their options for a type, and -1 or 0 means any."""
    if isinstance(value, str):
        return value or "*"
    return "COMBO" if isinstance(value, list) else "*"


def _link(entry: Any) -> tuple[str, CanvasLink] | None:
    if isinstance(entry, list) and len(entry) >= 5:
        parts = entry[:5]
    elif isinstance(entry, dict):
        parts = [entry.get(key) for key in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
    else:
        return None
    link_id, origin, origin_slot, target, target_slot = parts
    if not all(_is_id(part) for part in parts) or not str(origin_slot).isdigit() or not str(target_slot).lstrip("-").isdigit():
        return None
    return str(link_id), CanvasLink(str(origin), int(origin_slot), str(target), int(target_slot))


def _proxies(entries: Any) -> tuple[tuple[str, str], ...]:
    pairs = entries if isinstance(entries, list) else []
    return tuple((str(pair[0]), str(pair[1])) for pair in pairs if isinstance(pair, list) and len(pair) >= 2)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
