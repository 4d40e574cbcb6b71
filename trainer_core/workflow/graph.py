"""A workflow as data: nodes with named values, and links between them. Both of ComfyUI's formats become this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import Problem, UserError


@dataclass(frozen=True)
class Link:
    """An output of another node."""

    node: str
    slot: int


@dataclass(frozen=True)
class Node:
    """A node that ComfyUI would be sent.

    Args:
        id: as in the API format; inside subgraphs "instance:inner".
        type: the class, such as "LoRATrainer".
        title: what the person called it; the type's own title where nobody did.
        inputs: name, as in the API format (dots included) -> JSON value or Link.
    """

    id: str
    type: str
    title: str
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Graph:
    """The nodes by id, in the order of the file.

    Args:
        source: "api" or "ui", the format it came in.
        workflow: the editor's own JSON where there was one.
    """

    nodes: Mapping[str, Node]
    source: str = "api"
    workflow: dict[str, Any] | None = None

    def order(self) -> tuple[str, ...]:
        """Ids so that each node stands after all that it takes from; otherwise as in the file.

        Raises:
            UserError: nodes that wait for each other, named in the order of their links.
        """
        done: dict[str, None] = {}
        for start in self.nodes:
            path: dict[str, list[str]] = {}  # from start to the node at hand: node -> all that it takes from
            waiting = [start] if start not in done else []
            while waiting:
                node_id = waiting[-1]
                sources = path.setdefault(node_id, self._sources(node_id))
                pending = next((source for source in sources if source not in done), None)
                if pending is None:
                    del path[node_id]
                    done[waiting.pop()] = None
                elif pending in path:
                    raise UserError([self._circle(list(path), pending)])
                else:
                    waiting.append(pending)
        return tuple(done)

    def _sources(self, node_id: str) -> list[str]:
        inputs = self.nodes[node_id].inputs.values()
        return [value.node for value in inputs if isinstance(value, Link) and value.node in self.nodes]

    def _circle(self, path: list[str], again: str) -> Problem:
        circle = [*path[path.index(again) :], again]
        shown = " <- ".join(f"{node_id} ({self.nodes[node_id].type})" for node_id in circle)
        return Problem("workflow", f"nodes wait for each other: {shown}; take one of these links away")


@dataclass(frozen=True)
class Widget:
    """One widget of a node, in the order of `widgets_values`.

    Args:
        name: as in the API format; a DynamicCombo's own widgets carry its name and a dot in front.
        type: of its socket when it is turned into one ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO").
        control: the editor saves one value more after it (control_after_generate).
        options: of a DynamicCombo: choice -> the widgets it brings.
    """

    name: str
    type: str = ""
    default: Any = None
    control: bool = False
    options: Mapping[str, tuple[Widget, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Schema:
    """The widget order of one node type. title: what the editor calls a node of this type that nobody renamed."""

    widgets: tuple[Widget, ...]
    title: str = ""
