"""What a tracker brings: one file with a class, and one registry line.

A tracker shows a run somewhere else. It is made and called in a thread of its own (lane.py), so that it may wait for a disk or a
network; what it raises is told once, and the run goes on without it.
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

    Args:
        folder: of the run; a tracker writes into a folder of its own in it.
        name: of the LoRA.
        settings: of the request, nested, as JSON values.
        step: that it goes on from; 0: it begins. Later steps may have been told before, and were lost.
        prompts: of the validation pictures, in their order.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    step: int = 0
    prompts: tuple[str, ...] = ()


class Tracker(Protocol):
    """Made with an Opening, and with a way to tell the user something."""

    def __init__(self, opening: Opening, tell: Callable[[str], None]): ...

    @staticmethod
    def missing() -> str:
        """ "" where it can work here, else what is missing and what to do. Loads nothing heavy."""
        ...

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves, by name, such as "train/loss". Steps never fall."""
        ...

    def picture(self, step: int, name: str, path: Path, caption: str) -> None:
        """A PNG."""
        ...

    def summary(self, step: int, values: Mapping[str, Any]) -> None:
        """What the run came to: JSON values, flat. May be told more than once; the last one holds."""
        ...

    def close(self, failed: bool) -> None:
        """The run is over. failed: by a fault; not where the user ended it."""
        ...


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float | bool]]:
    """Nested settings as ("training.rank", 16); items of lists by their number, what is None left out."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                yield from flat({str(i): item}, f"{name}.")
        elif value is not None:
            yield name, value
