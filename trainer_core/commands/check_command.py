"""The command `chroma-trainer check`."""

from __future__ import annotations

import argparse
import sys

from ..command_line.arguments import add_workflow_arguments
from ..command_line.command_host import make_host
from ..console import print_text
from ..errors import UserError, printable
from ..workflow.check import check, list_skipped
from .graph_arguments import read_graph
from .run_command import WORKFLOW, add_devices


def add_check(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("workflow", help=WORKFLOW)
    add_workflow_arguments(parser)
    add_devices(parser)


def check_workflow(arguments: argparse.Namespace) -> int:
    """List all problems of a workflow without running it."""
    graph, catalogue = read_graph(arguments), arguments.trainer().catalogue
    warnings: list[str] = []
    problems = check(graph, catalogue, make_host(arguments), warnings)
    for text in warnings:
        print(f"warning: {printable(text)}", file=sys.stderr)
    if problems:
        raise UserError(problems)
    print_text(f"{arguments.workflow}: no problems")
    left_out = list_skipped(graph, catalogue)
    if left_out:
        print_text(f"skipped, these nodes only run in ComfyUI: {', '.join(left_out)}")
    return 0
