"""Answers without questions: what `chroma-trainer new --yes` would choose, for the node QuickLora."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..errors import Problem, UserError
from ..host import Host, SinkHost, collect
from .card import Card
from .interview import Answers, Interview
from .questions import Terminal


@dataclass(frozen=True)
class NoTerminal(Terminal):
    """Answers every question with its default, and prints nothing."""

    takes_defaults: bool = True

    def say(self, text: str) -> None:
        pass


def answers_of(options: Mapping[str, str], host: Host, detect_card: Callable[[], Card]) -> Answers:
    """Return the answers of a user who gives these options, and takes the defaults of all others.

    Args:
        options: name of an answer -> its text, as on the command line without "--".
        host: its paths are searched for models and images; its cache keeps what is read of the images.
        detect_card: returns the accelerator of this machine.
    Raises:
        UserError: some options are wrong, or the folder is in no datasets folder; all problems are listed, each at
            the name of its option.
    """
    own = SinkHost(paths=host.paths, is_cancelled=lambda: bool(host.check_cancelled()))
    interview = Interview(own, NoTerminal(), options, detect_card, keeps_scan=True)
    problems: list[Problem] = []
    if "images" in options:  # a workflow finds no other folders
        collect(problems, host.paths.find_dataset, options["images"], "images")
    try:
        interview.check_options()
    except UserError as error:
        named = {problem.field for problem in problems}
        problems += [own for own in map(_at_field, error.problems) if own.field not in named]
    if problems:
        raise UserError(problems)
    try:
        return interview.run()
    except UserError as error:
        raise UserError(map(_at_field, error.problems)) from error


def _at_field(problem: Problem) -> Problem:
    return replace(problem, field=problem.field.removeprefix("--"))
