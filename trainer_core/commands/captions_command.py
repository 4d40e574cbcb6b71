"""The command `chroma-trainer captions`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from ..command_line.arguments import add_workflow_arguments
from ..console import Console
from ..errors import printable
from ..host import SinkHost
from .graph_arguments import read_graph, run_trainers


def add_captions(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("workflow", help="as for run")
    add_workflow_arguments(parser)
    parser.add_argument("--epochs", type=_count, default=0, metavar="N", help="only the first N epochs (default: all)")
    parser.add_argument("--json", action="store_true", help="each sample as a line of JSON")


def list_captions(arguments: argparse.Namespace) -> int:
    """List the caption of every sample at every epoch, as the run trains them; loads no model."""
    from ..train.caption_list import trained_captions

    graph, trainer = read_graph(arguments), arguments.trainer()

    def list_instead(inputs: Any, host: SinkHost) -> tuple[Any, ...]:
        if not arguments.json:
            print("epoch\tstep\tfolder\timage\tmirrored\tcaption")
        for item in trained_captions(trainer.request_of(inputs), host, arguments.epochs):
            values = [item.epoch, item.step, item.folder, item.image, int(item.is_mirrored), item.caption]
            print(json.dumps(vars(item)) if arguments.json else "\t".join(printable(str(value)) for value in values))
        return trainer.no_outputs()

    try:
        run_trainers(graph, arguments, list_instead, (Console(),))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _count(text: str) -> int:
    if not (text.isdecimal() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of epochs; write for example 2")
    return int(text)
