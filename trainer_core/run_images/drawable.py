"""Which runs can be asked for images. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import Problem, UserError
from ..runs import layout
from ..runs.control import find_run, read_status

MAX_PROMPTS, MAX_LETTERS = 64, 4000


def drawable_run(text: str, output: Path, only_inside: bool = False) -> Path:
    """Return the folder of a run for a user's input.

    Args:
        text: name or path of a run's folder, or name of its LoRA.
        output: output folder with the runs.
        only_inside: refuse folders elsewhere, for inputs of a workflow, which may come from an untrusted source.
    Raises:
        UserError: there is none, it is running, or it has no checkpoint.
    """
    if not text.strip():
        raise UserError.at("run", "is empty; enter the name of a run's folder, or of its LoRA")
    folder = find_run(text.strip(), output)
    if only_inside and not folder.resolve().is_relative_to(layout.runs_folder(output).resolve()):
        raise UserError.at("run", f"{text!r} is outside of the output folder; use the name of a run in it")
    status = read_status(folder)
    if status and status.state == "running":
        way = f"pause it first: chroma-trainer pause {folder.name}"
        raise UserError.at("run", f"{folder.name} {status.clause()}, and its model fills the memory; {way}")
    if not layout.list_checkpoints(folder / layout.CHECKPOINTS):
        raise UserError.at("run", f"{folder.name} has no checkpoint yet, so there are no weights to sample with")
    return folder


def prompts_in(lines: Sequence[str]) -> list[str]:
    """Return the prompts, each once.

    Raises:
        UserError: there are none, too many, or one is too long.
    """
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    problems = []
    if not prompts:
        problems.append(Problem("prompts", "is empty; write one prompt per line"))
    if len(prompts) > MAX_PROMPTS:
        problems.append(Problem("prompts", f"are {len(prompts)}; at most {MAX_PROMPTS} are sampled at once"))
    if any(len(prompt) > MAX_LETTERS for prompt in prompts):
        problems.append(Problem("prompts", f"has more than {MAX_LETTERS} characters in one line"))
    if problems:
        raise UserError(problems)
    return prompts
