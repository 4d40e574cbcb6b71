"""The command `chroma-trainer draw`. Heavy modules are imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console import print_text
from ..errors import UserError


def add_draw(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command, beside those for a workflow."""
    parser.add_argument("run", help="path or name of a run's folder, or name of its LoRA")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to sample; each is a row of the grid")
    parser.add_argument(
        "--compare", metavar="A,B", help="sample two versions for a blind vote in ComfyUI's sidebar: steps of checkpoints, "
        "names of LoRAs, or base; without prompts, those of the run's ValidateSampler"
    )  # fmt: skip
    parser.add_argument(
        "--strengths", metavar="S,S,...", help="sample the newest weights at these strengths for the slider"
    )
    parser.add_argument(
        "--checkpoints", metavar="C,C,...", help="with --strengths: of these checkpoints instead of the newest one: all, "
        "last 3, or steps such as 250,500"
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="with them: seeds of each prompt (default: 1)"
    )


def draw_prompts(arguments: argparse.Namespace) -> int:
    """Sample prompts with the weights of a paused or ended run, which it can be resumed from afterwards."""
    from .drawable import Asked, drawable_run, prompts_in

    asked = Asked(arguments.compare or "", arguments.strengths or "", arguments.seeds, arguments.checkpoints or "")
    if not asked.is_set and not any(prompt.strip() for prompt in arguments.prompts):
        text = "is missing; write at least one after the run, such as: chroma-trainer draw my-run 'a cat'"
        raise UserError.at("PROMPT", text)
    prompts = [] if asked.is_set and not arguments.prompts else prompts_in(arguments.prompts)
    folder = drawable_run(arguments.run, Path(arguments.output or "output"))
    arguments.output = str(folder.parent.parent)
    if asked.is_set:
        from .draw_set import draw_asked

        host = arguments.make_host(arguments)
        print_text(str(draw_asked(folder, asked, prompts, arguments.trainer(), host, arguments.set)))
        return 0
    from .draw_run import draw_run

    for path in draw_run(folder, prompts, arguments.trainer(), arguments.make_host(arguments), arguments.set):
        print_text(str(path))
    return 0
