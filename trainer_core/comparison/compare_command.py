"""The command `chroma-trainer compare`. Heavy modules are imported when it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..console import print_text
from ..host import SinkHost
from ..spec import NodeSpec
from ..workflow.execute import only_trainer, run_instead
from ..workflow.graph import Graph

ReadGraph = Callable[[argparse.Namespace], Graph]
MakeHost = Callable[[argparse.Namespace], SinkHost]


def add_compare(
    parser: argparse.ArgumentParser, read_graph: ReadGraph, host: MakeHost, catalogue: Mapping[str, NodeSpec], node: Any
) -> None:
    """Add the arguments of the command.

    Args:
        parser: has the arguments for a workflow.
        read_graph: reads the workflow of the arguments.
        host: makes the environment.
        catalogue: all nodes by type.
        node: module of the node that trains.
    """
    parser.add_argument("first", metavar="A", help="LoRA file (.safetensors), or its name in the output folder's loras")
    parser.add_argument("second", metavar="B", help="the other one")
    parser.add_argument(
        "--workflow",
        required=True,
        metavar="FILE",
        help="workflow with the model, the images and the prompts, as for run",
    )
    parser.add_argument(
        "--images", metavar="DIR", default="",
        help="measure the loss on all images of this folder (default: the held-out images of the workflow's dataset)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(read_graph=read_graph, make_host=host, catalogue=catalogue, trainer_node=node)


def compare_loras(arguments: argparse.Namespace) -> int:
    """Compare two LoRAs and their base on the same images, noise and prompts."""
    from .compare_loras import compare, find_contenders, request_for, result_path

    node, output = arguments.trainer_node, Path(arguments.output or "output")
    contenders = find_contenders(arguments.first, arguments.second, output)
    graph, host = arguments.read_graph(arguments), arguments.make_host(arguments)
    only_trainer(graph, node.SPEC.id)
    request: Any = run_instead(
        graph, arguments.catalogue, node.SPEC.id, lambda inputs, _: node.request_of(inputs), host
    )
    result = compare(request_for(request, arguments.images), contenders, host, bool(arguments.images))
    if arguments.json:
        print(json.dumps(result.as_json(), indent=2))
        return 0
    print_text(result.text())
    for path in (*result.grids, result_path(contenders, output)):
        print_text(f"  {path}")
    return 0
