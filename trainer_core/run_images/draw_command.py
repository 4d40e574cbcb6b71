"""The command `chroma-trainer draw`. Heavy modules are imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..console import print_text
from ..host import SinkHost
from ..spec import NodeSpec
from ..workflow.graph import Schema

MakeHost = Callable[[argparse.Namespace], SinkHost]


def add_draw(
    parser: argparse.ArgumentParser,
    host: MakeHost,
    catalogue: Mapping[str, NodeSpec],
    schemas: Callable[[], Mapping[str, Schema]],
    node: Any,
) -> None:
    """Add the arguments of the command.

    Args:
        parser: has the arguments for a workflow.
        host: makes the environment.
        catalogue: all nodes by type.
        schemas: returns the widget orders by node type.
        node: module of the node that trains.
    """
    parser.add_argument("run", help="path or name of a run's folder, or name of its LoRA")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to sample; each is a row of the grid")
    parser.set_defaults(make_host=host, catalogue=catalogue, schemas=schemas, trainer_node=node)


def draw_prompts(arguments: argparse.Namespace) -> int:
    """Sample prompts with the weights of a paused or ended run, which it can be resumed from afterwards."""
    from .drawable import drawable_run, prompts_in

    prompts = prompts_in(arguments.prompts)
    folder = drawable_run(arguments.run, Path(arguments.output or "output"))
    from .draw_run import Trainer, draw_run

    node = arguments.trainer_node
    trainer = Trainer(arguments.catalogue, arguments.schemas(), node.SPEC.id, node.request_of)
    arguments.output = str(folder.parent.parent)
    for path in draw_run(folder, prompts, trainer, arguments.make_host(arguments), arguments.set):
        print_text(str(path))
    return 0
