"""Run a checked graph node by node, as ComfyUI's executor would."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..config.request import TrainRequest
from ..errors import UserError
from ..host import Notice, SinkHost
from ..spec import NodeSpec, build_inputs
from .check import check, list_skipped
from .graph import Graph, Link, Schema
from .images import SAVERS, save_images
from .read import to_api
from .resolve import resolve


def execute(graph: Graph, catalogue: Mapping[str, NodeSpec], host: SinkHost) -> dict[str, tuple[Any, ...]]:
    """Return the outputs of every node in the catalogue, by node id.

    Raises:
        UserError: Every problem of the graph, before the first node runs; or a problem of a node while it runs.
        Cancelled: The user canceled the run.
    """
    problems = check(graph, catalogue, host)
    if problems:
        raise UserError(problems)
    skipped = list_skipped(graph, catalogue)
    if skipped:
        host.emit(Notice(f"skipped, these nodes only run in ComfyUI: {', '.join(skipped)}"))
    outputs: dict[str, tuple[Any, ...]] = {}
    prompt = to_api(graph)
    for node_id in graph.order():
        node = graph.nodes[node_id]
        if node.type in SAVERS:
            source = node.inputs.get("images")
            if isinstance(source, Link) and source.node in outputs:
                save_images(outputs[source.node][source.slot], node, host)
        if node.type not in catalogue:
            continue
        spec = catalogue[node.type]
        resolved = resolve(node, graph, catalogue, outputs)
        inputs, faults = build_inputs(spec, resolved.values)
        run = spec.stored if spec.stored and resolved.is_stored else spec.run
        try:
            if inputs is None:
                raise UserError(faults)
            outputs[node_id] = run(inputs, replace(host, prompt=prompt, node_id=node_id))
        except UserError as error:
            raise UserError(problem.at(node.id, node.type) for problem in error.problems) from error
    return outputs


def up_to(graph: Graph, node_types: Collection[str]) -> Graph:
    """Return the nodes of these types, and what they depend on."""
    return with_sources(graph, {id for id, node in graph.nodes.items() if node.type in node_types})


def with_sources(graph: Graph, ids: Collection[str]) -> Graph:
    """Return these nodes, and what they depend on."""
    needed = set(ids)
    before: set[str] = set()
    while before != needed:
        before = set(needed)
        needed |= {v.node for id in before for v in graph.nodes[id].inputs.values() if isinstance(v, Link)}
    return replace(graph, nodes={id: node for id, node in graph.nodes.items() if id in needed})


@dataclass(frozen=True)
class TrainerNode:
    """What commands need of the nodes, which they can't import.

    Attributes:
        catalogue: All nodes by type.
        schemas: Widget orders by node type.
        type: Type of the node that trains.
        request_of: Returns the request of its inputs.
        train: Trains its inputs in a host, with a judge that may end the run at a checkpoint (train/run.py), or None.
        types: Types of all nodes that train: this one, and those that make it and run it.
        catalogue_with: Returns all nodes by type, with a function in place of the training.
    """

    catalogue: Mapping[str, NodeSpec]
    schemas: Mapping[str, Schema]
    type: str
    request_of: Callable[[Any], TrainRequest]
    train: Callable[[Any, Any, Any], Any]
    types: tuple[str, ...]
    catalogue_with: Callable[[Callable[[Any, SinkHost], tuple[Any, ...]]], Mapping[str, NodeSpec]]

    def no_outputs(self) -> tuple[None, ...]:
        """Return the outputs of a node that did not train."""
        return (None,) * len(self.catalogue[self.type].outputs)

    def only_id(self, graph: Graph) -> str:
        """Return the id of the only node that trains.

        Raises:
            UserError: there is none, or several.
        """
        ids = [id for id, node in graph.nodes.items() if node.type == self.type]
        if len(ids) != 1:
            text = f"has {len(ids)} {self.type} nodes ({', '.join(ids)}), and one is wanted; remove the others"
            raise UserError.at("workflow", text if ids else f"has no {self.type} node; add one")
        return ids[0]

    def run_instead(self, graph: Graph, call: Callable[[Any, SinkHost], object], host: SinkHost) -> object:
        """Run what the only trainer depends on, and `call` with its inputs in place of the training. Return its result.

        Raises:
            UserError: every problem of the workflow.
        """
        results: list[object] = []
        spec = self.catalogue[self.type]

        def keep(inputs: Any, at: SinkHost) -> tuple[Any, ...]:
            results.append(call(inputs, at))
            return self.no_outputs()

        execute(up_to(graph, (self.type,)), {**self.catalogue, self.type: replace(spec, run=keep)}, host)
        return results[0]

    def request(self, graph: Graph, host: SinkHost) -> TrainRequest:
        """Return the request of the only trainer.

        Raises:
            UserError: every problem of the workflow.
        """
        request = self.run_instead(graph, lambda inputs, _: self.request_of(inputs), host)
        assert isinstance(request, TrainRequest)
        return request
