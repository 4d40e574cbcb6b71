"""The interface of a tracker, which shows a run in another program.

A new tracker is one file with a class, and one registry line.

A tracker is created and called in its own thread (worker.py), so that it may wait for a disk or a network. If it raises
an exception, the exception is reported once and the run continues without the tracker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

NONE = "none"


@dataclass(frozen=True)
class Opening:
    """A run that is about to train.

    Attributes:
        folder: Folder of the run; a tracker writes to its own subfolder.
        name: Name of the LoRA.
        settings: Settings of the request, nested, as JSON values.
        step: The step that the run resumes from; 0 for a new run. Later steps may have been reported before and were
            lost.
        prompts: Prompts of the validation images, in order.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    step: int = 0
    prompts: tuple[str, ...] = ()


class Tracker(Protocol):
    """A tracker, created with an Opening and a function that shows a line of text to the user."""

    def __init__(self, opening: Opening, log: Callable[[str], None]): ...

    @staticmethod
    def missing() -> str:
        """Return "" if the tracker can be used, else what is missing and how to fix it.

        It must not import anything heavy.
        """
        ...

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars by name, such as "train/loss". Steps never decrease."""
        ...

    def picture(self, step: int, name: str, path: Path, caption: str) -> None:
        """Log a PNG image."""
        ...

    def summary(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the results of the run: JSON values, flat. May be called more than once; the last call counts."""
        ...

    # A tracker may also have `def event(self, event: Event) -> None`, which receives every event of the run, and
    # `@staticmethod def last_seconds(usual: float) -> float`: how long a run waits for it at its end.

    def close(self, failed: bool) -> None:
        """End the run.

        Args:
            failed: Whether the run ended with an error. False if the user stopped it.
        """
        ...


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float | bool]]:
    """Yield nested settings as ("training.rank", 16). List items are named by their index; None is skipped."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                yield from flat({str(i): item}, f"{name}.")
        elif value is not None:
            yield name, value
