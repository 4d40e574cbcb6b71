"""What an item is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Context:
    """Where an item runs.

    Args:
        is_rehearsal: everything is tiny, on a CPU: only the code is tried.
        out: results and traces go here. scratch: files that may be deleted at any time; later calls find them again.
        limit_flops: FLOP/s of a large bf16 product on this device, 0 unknown.
        is_traced: whether one step is written as a chrome trace.
        import_seconds: that this process took before it could begin.
        is_beside: whether other items run at the same time: what is known of attention kernels is in one file for those
            that run one after the other, which no two may write at a time.
        tell: call it with what is known so far: that is kept if the process dies or its time is over.
    """

    device: torch.device
    is_rehearsal: bool
    out: Path
    scratch: Path
    limit_flops: float = 0.0
    is_traced: bool = False
    import_seconds: float = 0.0
    is_beside: bool = False
    tell: Callable[[dict[str, Any]], None] = lambda figures: None

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, real: Any, tiny: Any) -> Any:
        """The one on a GPU, the other in a rehearsal."""
        return tiny if self.is_rehearsal else real


@dataclass
class Finding:
    """Args:
    summary: for one line. figures: JSON values.
    faults: what does not hold, each in words; with any the item has failed.
    """

    summary: str
    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


class Skipped(Exception):
    """Something that the item needs is not on this machine; what, in words."""
