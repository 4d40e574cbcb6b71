"""The part of a workflow that trains, and how to call something else in place of the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import UserError
from ..host import SinkHost
from ..spec import NodeSpec
from .execute import execute
from .graph import Graph, Link


def up_to(graph: Graph, node_type: str) -> Graph:
    """Return the nodes of a type, and what they depend on."""
    needed = {id for id, node in graph.nodes.items() if node.type == node_type}
    before: set[str] = set()
    while before != needed:
        before = set(needed)
        needed |= {v.node for id in before for v in graph.nodes[id].inputs.values() if isinstance(v, Link)}
    return replace(graph, nodes={id: node for id, node in graph.nodes.items() if id in needed})


def only_trainer(graph: Graph, node_type: str) -> str:
    """Return the id of the only node that trains.

    Raises:
        UserError: there is none, or several.
    """
    ids = [id for id, node in graph.nodes.items() if node.type == node_type]
    if len(ids) != 1:
        text = f"has {len(ids)} {node_type} nodes ({', '.join(ids)}), and one is wanted; remove the others"
        raise UserError.at("workflow", text if ids else f"has no {node_type} node; add one")
    return ids[0]


def run_instead(
    graph: Graph,
    catalogue: Mapping[str, NodeSpec],
    node_type: str,
    call: Callable[[Any, SinkHost], object],
    host: SinkHost,
) -> object:
    """Run what the only trainer depends on, and `call` with its inputs in place of the training. Return its result.

    Raises:
        UserError: every problem of the workflow.
    """
    results: list[object] = []
    spec = catalogue[node_type]

    def keep(inputs: Any, at: SinkHost) -> tuple[Any, ...]:
        results.append(call(inputs, at))
        return (None,) * len(spec.outputs)

    execute(up_to(graph, node_type), {**catalogue, node_type: replace(spec, run=keep)}, host)
    return results[0]
