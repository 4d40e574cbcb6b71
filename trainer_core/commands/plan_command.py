"""The command `chroma-trainer plan`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..command_line.arguments import add_device_argument, add_workflow_arguments, check_device
from ..console import print_text
from ..host import SinkHost
from .graph_arguments import read_graph, run_trainers
from .run_command import add_devices


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("workflow", help="as for run")
    add_workflow_arguments(parser)
    parser.add_argument(
        "--vram",
        type=_gigabytes,
        default=0.0,
        metavar="GB",
        help="plan for an accelerator with this memory, as it is sold: 12 for a 12 GB card",
    )
    parser.add_argument("--ram", type=_gigabytes, default=0.0, metavar="GB", help="plan for this much RAM")
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_device_argument(parser)
    add_devices(parser)


def plan(arguments: argparse.Namespace) -> int:
    """Estimate memory, disk and time of a run, and suggest what fits where it does not; loads no weights."""
    graph, trainer = read_graph(arguments), arguments.trainer()
    plans: list[dict[str, Any]] = []

    def plan_instead(inputs: Any, host: SinkHost) -> tuple[Any, ...]:
        from ..train.planning import plan_for, plan_text

        estimate, suggestion = plan_for(trainer.request_of(inputs), host, arguments.vram, arguments.ram)
        plans.append({**estimate.as_json(), "advice": suggestion})
        if not arguments.json:
            print_text(plan_text(estimate, suggestion))
        return trainer.no_outputs()

    check_device(arguments)
    run_trainers(graph, arguments, plan_instead)
    if arguments.json:
        print(json.dumps(plans[0] if len(plans) == 1 else plans, indent=2))
    return 0


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GB; write for example 12")
    return value
