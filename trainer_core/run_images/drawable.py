"""Which runs can be asked for images. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.validation import CheckpointChoice, ValidationConfig
from ..errors import Problem, UserError, quoted
from ..host import collect
from ..runs import layout
from ..runs.control import find_run, read_status

MAX_PROMPTS, MAX_LETTERS = 64, 4000
MAX_SEEDS, MAX_STRENGTHS, LARGEST = 64, 40, 10.0


@dataclass(frozen=True)
class Asked:
    """What a user asks for beside a grid: images for a blind vote, or for a slider of strengths.

    Attributes:
        compare: Two versions, separated by a comma.
        strengths: Strengths, separated by commas.
        num_seeds: Seeds of each prompt.
        checkpoints: With strengths: all, last 3, or steps separated by commas; "" for the newest.
    """

    compare: str = ""
    strengths: str = ""
    num_seeds: int = 1
    checkpoints: str = ""

    def __post_init__(self) -> None:
        problems = []
        if self.compare.strip() and self.strengths.strip():
            problems.append(Problem("strengths", "and compare are two kinds of images; leave one of them empty"))
        if not 1 <= self.num_seeds <= MAX_SEEDS:
            problems.append(Problem("num_seeds", f"is {self.num_seeds}; use 1 to {MAX_SEEDS}"))
        collect(problems, self.strength_list)
        collect(problems, self.checkpoint_choice)
        if self.checkpoints.strip() and not self.strengths.strip():
            text = "are for the slider of strengths; write strengths too, such as 0, 0.5, 1"
            problems.append(Problem("checkpoints", text))
        if problems:
            raise UserError(problems)

    @property
    def is_set(self) -> bool:
        """Whether anything but a grid is asked for."""
        return bool(self.compare.strip() or self.strengths.strip())

    def names(self) -> list[str]:
        """Return the versions to compare."""
        return [name.strip() for name in self.compare.split(",") if name.strip()]

    def checkpoint_choice(self) -> CheckpointChoice:
        """Return the checkpoints of the slider. False: the newest.

        Raises:
            UserError: they are no valid selection.
        """
        return ValidationConfig(checkpoints=self.checkpoints).checkpoint_choice()

    def strength_list(self) -> list[float]:
        """Return the strengths, each once, ascending.

        Raises:
            UserError: One is no number, or they are too many.
        """
        texts = [text.strip() for text in self.strengths.split(",") if text.strip()]
        try:
            values = sorted({float(text) for text in texts})
        except ValueError:
            raise UserError.at(
                "strengths", f"{self.strengths[:60]!r} are not numbers; write them as 0, 0.5, 1"
            ) from None
        if values and not (len(values) <= MAX_STRENGTHS and all(-LARGEST <= value <= LARGEST for value in values)):
            raise UserError.at("strengths", f"are at most {MAX_STRENGTHS} numbers from -{LARGEST:g} to {LARGEST:g}")
        if len(values) == 1 and not self.checkpoints.strip():
            raise UserError.at("strengths", "is one number; a slider needs two or more, such as 0, 0.5, 1")
        return values


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
        raise UserError.at("run", f"{quoted(text)} is outside of the output folder; use the name of a run in it")
    status = read_status(folder)
    if status and status.state == "running":
        way = f"pause it first: chroma-trainer pause {folder.name}"
        raise UserError.at("run", f"{folder.name} {status.clause()}, and its model fills the memory; {way}")
    checkpoints = layout.list_checkpoints(folder / layout.CHECKPOINTS)
    if not checkpoints:
        raise UserError.at("run", f"{folder.name} has no checkpoint yet, so there are no weights to sample with")
    newest = checkpoints[-1]
    if (newest / layout.CHECKPOINT_STATE).is_file() and not (newest / layout.CHECKPOINT_LORA).is_file():
        way = f"sample with its model, in {layout.MODELS} of the output folder, as with any other model"
        raise UserError.at("run", f"{folder.name} has no LoRA in its checkpoints, as it trains the whole model; {way}")
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
