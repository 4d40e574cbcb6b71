"""The command `chroma-trainer run`."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from ..command_line.arguments import add_device_argument, add_workflow_arguments, check_device
from ..command_line.command_host import machines_of, make_host
from ..command_line.interrupts import Interrupts
from ..command_line.outcome import STARTED
from ..console import Console
from ..errors import Problem, UserError
from ..host import Event, RunReported, collect
from ..paths import check_writable
from ..storage.atomic import write_json
from ..workflow.execute import execute, up_to
from .graph_arguments import read_graph

WORKFLOW = "exported workflow (.json, either format), a run's request.json, or a PNG or LoRA with a workflow"


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("workflow", help=WORKFLOW)
    add_run_options(parser)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that trains a workflow."""
    add_workflow_arguments(parser)
    parser.add_argument("--report", metavar="FILE", help="write a JSON report")
    add_device_argument(parser)
    add_devices(parser)
    parser.add_argument("--nodes", type=int, metavar="N", help="train on N machines; start this on each of them")
    parser.add_argument("--node", type=int, metavar="I", help="number of this machine, from 0, which saves the LoRA")
    text = "where the machines meet: address of machine 0 and a free port"
    parser.add_argument("--meet", metavar="HOST:PORT", help=text)


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Add --devices."""
    text = "train on several devices: auto, 2, 0,1 or cpu:2 (default: LoRATrainer's field devices)"
    parser.add_argument("--devices", metavar="LIST", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Run the workflow: train its LoRA."""
    graph, trainer = read_graph(arguments), arguments.trainer()
    _check_output_paths(arguments)
    reports: list[dict[str, Any]] = []

    def keep_report(event: Event) -> None:
        if isinstance(event, RunReported):
            reports.append(event.report)

    is_main = os.environ.get("RANK", "0") == "0"
    is_first = is_main and machines_of(arguments).number == 0
    if not is_first:  # the LoRA is on another machine, or another process uses it
        graph = up_to(graph, trainer.types)
    sinks = (Console(), keep_report) if is_main else (keep_report,)
    execute(graph, trainer.catalogue, make_host(arguments, sinks, Interrupts()))
    if arguments.report and is_first:
        write_json(Path(arguments.report), _join_reports(reports))
    return 0


def _check_output_paths(arguments: argparse.Namespace) -> None:
    """Check before the training that its results can be written."""
    if arguments.report and Path(arguments.report).is_dir():
        raise UserError.at("--report", f"{arguments.report!r} is a folder; use the path of a file")
    problems: list[Problem] = []
    collect(problems, check_writable, "--output", Path(arguments.output or "output"))
    if arguments.report:
        collect(problems, check_writable, "--report", Path(arguments.report).parent)
    if problems:
        raise UserError(problems)
    check_device(arguments)


def _join_reports(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the run's report.

    With several trainers in the graph it is the last one's report, with all of them under "runs".
    """
    total = round(time.perf_counter() - STARTED, 3)
    last = dict(reports[-1]) if reports else {}
    return {**last, "total_seconds": total, **({"runs": reports} if len(reports) > 1 else {})}
