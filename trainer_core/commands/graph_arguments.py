"""From the arguments of a command to its graph, and to the trainers in it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..command_line.command_host import make_host
from ..errors import UserError
from ..host import SinkHost
from ..workflow.execute import TrainerNode, execute, up_to
from ..workflow.graph import Graph
from ..workflow.overrides import override
from ..workflow.read import read_workflow

Call = Callable[[Any, SinkHost], tuple[Any, ...]]


def read_graph(arguments: argparse.Namespace) -> Graph:
    """Return the workflow with the values of --set and --devices.

    Raises:
        UserError: every problem of the workflow and of the values.
    """
    trainer: TrainerNode = arguments.trainer()
    graph = read_workflow(Path(arguments.workflow), trainer.schemas)
    graph = override(graph, arguments.set, trainer.catalogue)
    devices = getattr(arguments, "devices", None)
    if devices is None:
        return graph
    ids = [node.id for node in graph.nodes.values() if node.type == trainer.type]
    return override(graph, [f"{id}.devices={devices}" for id in ids], trainer.catalogue)


def run_trainers(graph: Graph, arguments: argparse.Namespace, call: Call, sinks: tuple = ()) -> None:
    """Run the graph's trainers and what they need, with `call` in place of the training."""
    trainer: TrainerNode = arguments.trainer()
    graph = up_to(graph, trainer.types)
    if not graph.nodes:
        raise UserError.at("workflow", f"has no {trainer.type} node, so there is nothing to plan or list; add one")
    execute(graph, trainer.catalogue_with(call), make_host(arguments, sinks))
