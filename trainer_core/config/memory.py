"""How the run fits into memory, and how fast it goes: the widgets of MemorySettings. None of it changes what is learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..spec import Doc, Range


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Trades of memory for time."""

    checkpointing_interval: Annotated[
        int,
        Range(1, 64),
        Doc("With gradient_checkpointing: compute every so many-th block again. 1: all blocks, the least memory."),
    ] = 1
