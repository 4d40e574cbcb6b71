"""The command `chroma-trainer import`. Heavy modules are imported when it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from ..console import print_text
from ..errors import Problem, UserError
from ..host import collect
from ..paths import refuse_existing
from ..spec import NodeSpec
from ..storage.atomic import write_json


def add_import(parser: argparse.ArgumentParser, catalogue: Mapping[str, NodeSpec]) -> None:
    """Add the arguments of the command.

    Args:
        parser: the parser of the command.
        catalogue: the nodes by type.
    """
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="configuration of SimpleTuner, OneTrainer, ai-toolkit, kohya, kohya_ss, FluxGym or diffusion-pipe; the "
        "files that it names are found beside it, or are given as well",
    )
    parser.add_argument(
        "--output", "-o", default="workflow.json", metavar="FILE", help="the workflow (default: workflow.json)"
    )
    parser.add_argument("--force", action="store_true", help="replace the workflow if it exists")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.set_defaults(catalogue=catalogue)


def import_config(arguments: argparse.Namespace) -> int:
    """Convert another trainer's configuration to a workflow, and report what was taken over and what was not."""
    from .engine import import_files

    target = Path(arguments.output)
    problems: list[Problem] = []
    collect(problems, refuse_existing, "--output", arguments.output, arguments.force)
    try:
        imported = import_files([Path(name) for name in arguments.files], arguments.catalogue)
    except UserError as error:
        raise UserError([*error.problems, *problems]) from error
    if problems:
        raise UserError(problems)
    write_json(target, imported.workflow)
    if arguments.json:
        print(json.dumps({"trainer": imported.trainer, "workflow": str(target), **imported.report.as_json()}, indent=2))
    else:
        print_text(imported.report.text())
        print_text(f"{target}: the workflow of this {imported.trainer} configuration")
        print_text(f"next: chroma-trainer check {target}")
    return 0
