"""Settings of a sweep: the values to try. The widgets of SweepSettings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from ..errors import Problem
from ..spec import Doc, Text


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Fields and their values, of which every combination is trained."""

    over: Annotated[
        str,
        Text(multiline=True, placeholder="one field per line, such as rank=8,16"),
        Doc(
            "Fields and the values to try, one field per line: learning_rate=1e-4,2e-4. Every combination is trained. A "
            "field of another node, or one that several nodes have, is written with its node: DatasetBackend.resolution=512,768. "
            'Values with commas are a JSON list: targets=["all", "*.to_q,*.to_k"].'
        ),
    ] = "learning_rate=1e-4,2e-4"
    name: Annotated[
        str,
        Text(placeholder="empty: the name of LoRATrainer"),
        Doc("Name of the sweep, and of the subfolder of its LoRAs. Empty: the name of LoRATrainer."),
    ] = ""
    stop_losers: Annotated[
        bool,
        Doc(
            "End a run early once its held-out loss is above that of the best one at the same step, with 95 % certainty. "
            "It can end a run that learns slowly and would have been better in the end, such as one of a low learning rate."
        ),
    ] = False

    def lines(self) -> list[str]:
        """Return the fields with their values, as --over takes them."""
        return [line.strip().removeprefix("--over").strip() for line in self.over.splitlines() if line.strip()]

    def problems(self) -> list[Problem]:
        """Return the problems of these settings."""
        if self.lines():
            return []
        return [Problem("over", "is empty; write a field and its values, such as rank=8,16")]


@dataclass(frozen=True)
class Sweep:
    """A sweep, as nodes pass it on.

    Args:
        settings: The values to try.
        train: train(inputs of LoRATrainer, host) trains all of them, and returns the outputs of the best run; () where
            runs in the background train them.
    """

    settings: SweepConfig
    train: Callable[[Any, Any], tuple[Any, ...]]
