"""Which optimiser moves the weights: the widgets of OptimizerSettings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..registry import names
from ..spec import Choice, Doc


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser by name. Learning rate, its schedule and weight decay are the trainer's own widgets."""

    optimizer: Annotated[
        str, Choice(*names("optimizer")), Doc("adamw: AdamW with fp32 states, torch's own fused kernel.")
    ] = "adamw"
