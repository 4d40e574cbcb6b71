"""A workflow as nodes with named values, and links between them. Both of ComfyUI's formats are converted to this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import Problem, UserError


@dataclass(frozen=True)
class Link:
    """A connection to an output of another node.

    Attributes:
        node: Id of that node.
        slot: Index of its output.
    """

    node: str
    slot: int


@dataclass(frozen=True)
class Node:
    """A node as ComfyUI's server would receive it.

    Attributes:
        id: As in the API format; inside subgraphs "instance:inner".
        type: The node class, such as "LoRATrainer".
        title: The title that the user gave it, or else the display name of its type.
        inputs: Name as in the API format (including dots) -> JSON value or Link.
    """

    id: str
    type: str
    title: str
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Graph:
    """The nodes by id, in the order of the file.

    Attributes:
        nodes: Nodes by id.
        source: "api" or "ui", the format of the file.
        workflow: The editor's own JSON, if the file has it.
    """

    nodes: Mapping[str, Node]
    source: str = "api"
    workflow: dict[str, Any] | None = None

    def order(self) -> tuple[str, ...]:
        """Return the ids so that every node comes after its inputs, and otherwise in the order of the file.

        Raises:
            UserError: Nodes form a cycle; they are listed in the order of their links.
        """
        done: dict[str, None] = {}
        for start in self.nodes:
            path: dict[str, list[str]] = {}  # from the start to the current node: node -> its sources
            waiting = [start] if start not in done else []
            while waiting:
                node_id = waiting[-1]
                sources = path.setdefault(node_id, self._sources(node_id))
                pending = next((source for source in sources if source not in done), None)
                if pending is None:
                    del path[node_id]
                    done[waiting.pop()] = None
                elif pending in path:
                    raise UserError([self._describe_cycle(list(path), pending)])
                else:
                    waiting.append(pending)
        return tuple(done)

    def _sources(self, node_id: str) -> list[str]:
        inputs = self.nodes[node_id].inputs.values()
        return [value.node for value in inputs if isinstance(value, Link) and value.node in self.nodes]

    def _describe_cycle(self, path: list[str], again: str) -> Problem:
        cycle = [*path[path.index(again) :], again]
        chain = " <- ".join(f"{node_id} ({self.nodes[node_id].type})" for node_id in cycle)
        return Problem("workflow", f"nodes form a cycle: {chain}; remove one of these links")


@dataclass(frozen=True)
class Widget:
    """One widget of a node, in the order of `widgets_values`.

    Attributes:
        name: As in the API format; the widgets of a DynamicCombo are prefixed with its name and a dot.
        type: Type of its socket when it is converted to an input ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO").
        default: Default value.
        control: Whether the editor saves one more value after it (control_after_generate).
        options: Of a DynamicCombo: choice -> the widgets that it adds.
    """

    name: str
    type: str = ""
    default: Any = None
    control: bool = False
    options: Mapping[str, tuple[Widget, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Schema:
    """The widget order of one node type.

    Attributes:
        widgets: The widgets, in order.
        title: Display name of the type.
    """

    widgets: tuple[Widget, ...]
    title: str = ""
