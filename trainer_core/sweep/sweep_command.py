"""The command `chroma-trainer sweep`. Heavy modules are imported when it runs."""

from __future__ import annotations

import argparse
import json

from ..command_line.outcome import EXIT_USER
from ..console import print_text
from ..host import Notice


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command, beside those for a workflow."""
    parser.add_argument(
        "--over", action="append", default=[], metavar="FIELD=VALUE,VALUE",
        help="train with each of these values; may be repeated for all combinations. FIELD is NODE.FIELD as for --set, "
        "or a field that only one node has. A JSON list for values with commas: 'targets=[\"all\", \"a,b\"]'",
    )  # fmt: skip
    parser.add_argument("--name", default="", help="name of the sweep (default: that of the workflow's LoRA)")
    parser.add_argument(
        "--stop-losers", action="store_true",
        help="end a run early once its held-out loss is above that of the best one at the same step, with 95 %% certainty",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def sweep(arguments: argparse.Namespace) -> int:
    """Train a workflow with several values of some fields, and compare the results by their held-out loss."""
    from .combinations import combine, hint_of, read_axes
    from .results import as_json, table
    from .stored_sweep import CHART
    from .sweep import Sweep, plan_sweep, sweep_name

    graph, trainer = arguments.read_graph(arguments), arguments.trainer()
    host = arguments.make_host(arguments)
    name = sweep_name(graph, trainer, arguments.name)
    axes = read_axes(arguments.over, graph, trainer.catalogue)
    if hint := hint_of(axes, graph):
        host.emit(Notice(hint, "warning"))
    combinations = combine(axes)
    plans = plan_sweep(graph, combinations, name, trainer, host, arguments.stop_losers)
    run = Sweep(name, plans, trainer, host, arguments.stop_losers)
    rows = run.run()
    status = EXIT_USER if run.failed else 0
    failed = {label: "; ".join(map(str, problems)) for label, problems in run.failed.items()}
    if arguments.json:
        print(json.dumps({"runs": as_json(rows), "failed": failed, "folder": str(run.folder)}, indent=2))
        return status
    print_text(table(rows))
    for row in rows:
        if row.result.stopped:
            print_text(f"{row.result.name} was stopped at step {row.result.steps}: {row.result.stopped}")
    for label, reason in failed.items():
        print_text(f"{label} failed: {reason}. The same command tries it again")
    print_text(f"chart: {run.folder / CHART}")
    return status
