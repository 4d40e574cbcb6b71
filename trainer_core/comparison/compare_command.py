"""The command `chroma-trainer compare`. Heavy modules are imported when it runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..console import print_text


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command, beside those for a workflow."""
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


def compare_loras(arguments: argparse.Namespace) -> int:
    """Compare two LoRAs and their base on the same images, noise and prompts."""
    from .compare_loras import compare, find_contenders, request_for, result_path

    trainer, output = arguments.trainer(), Path(arguments.output or "output")
    contenders = find_contenders(arguments.first, arguments.second, output)
    graph, host = arguments.read_graph(arguments), arguments.make_host(arguments)
    trainer.only_id(graph)
    result = compare(
        request_for(trainer.request(graph, host), arguments.images), contenders, host, bool(arguments.images)
    )
    if arguments.json:
        print(json.dumps(result.as_json(), indent=2))
        return 0
    print_text(result.text())
    for path in (*result.grids, result_path(contenders, output)):
        print_text(f"  {path}")
    return 0
