"""The command `chroma-trainer draw`. Heavy modules are imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console import print_text


def add_draw(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command, beside those for a workflow."""
    parser.add_argument("run", help="path or name of a run's folder, or name of its LoRA")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to sample; each is a row of the grid")


def draw_prompts(arguments: argparse.Namespace) -> int:
    """Sample prompts with the weights of a paused or ended run, which it can be resumed from afterwards."""
    from .drawable import drawable_run, prompts_in

    prompts = prompts_in(arguments.prompts)
    folder = drawable_run(arguments.run, Path(arguments.output or "output"))
    from .draw_run import draw_run

    arguments.output = str(folder.parent.parent)
    for path in draw_run(folder, prompts, arguments.trainer(), arguments.make_host(arguments), arguments.set):
        print_text(str(path))
    return 0
