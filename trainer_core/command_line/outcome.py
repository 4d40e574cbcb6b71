"""How a command ends: its exit status, and the last lines that it prints."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from ..errors import Cancelled, Problem, UserError, printable

STARTED = time.perf_counter()  # of the process, but for the import of this file
EXIT_DIFFERENT, EXIT_USER, EXIT_CANCELLED = 1, 2, 130
MAX_MESSAGE = 4000  # characters of one printed error
PROCESS_GROUP = f"{__name__.partition('.command_line.')[0]}.distributed.process_group"


def status_of(call: Callable[[], int]) -> int:
    """Run a command. Return its exit status: 2 for a user error, 130 where the user canceled, else its own."""
    try:
        return call()
    except UserError as error:
        if not _is_silent():
            _print_last(*(f"error: {_one_line(problem)}" for problem in error.problems))
        return EXIT_USER
    except OSError as error:
        if error.errno is None:  # raised by a library, not by the operating system
            raise
        _print_last(f"error: {printable(str(error.filename or 'output'))}: {error.strerror}")
        return EXIT_USER
    except (Cancelled, KeyboardInterrupt):
        if _is_silent():
            return 0  # else torchrun would end rank 0, which is saving
        _print_last("canceled")
        return EXIT_CANCELLED


def _is_silent() -> bool:
    """Return whether rank 0 speaks for this process: torchrun started several, and they have found each other."""
    group = sys.modules.get(PROCESS_GROUP)
    return group is not None and group.has_joined() and os.environ.get("RANK") != "0"


def _one_line(problem: Problem) -> str:
    text = printable(str(problem))
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


def _print_last(*lines: str) -> None:
    """Print to stderr, which may be closed or full by now: the exit status says the same."""
    try:
        for line in lines:
            print(line, file=sys.stderr)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  else Python complains about the stream at its end
