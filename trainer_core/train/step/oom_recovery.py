"""Memory ran out in a step although the plan said that it would not: more blocks are computed again, and the step is begun anew.

Only where the plan was asked to choose (mode auto) and chose to store activations. What is random in a step is drawn from its
number, and nothing has moved the weights yet, so that the run's bytes are those of one that never ran out.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...config.memory import MemoryConfig
from ...config.training import TrainingConfig
from ...devices import empty_cache, is_out_of_memory
from ...host import Host, Notice
from ...memory.activation_checkpointing import INTERVALS, checkpoint_blocks_, places_to_recompute, store_blocks_


@dataclass
class OomRecovery:
    """blocks: of the transformer, of which every `interval`-th is computed again now."""

    blocks: Sequence[nn.Module]
    interval: int
    device: torch.device
    host: Host

    @classmethod
    def where_auto(
        cls,
        asked: MemoryConfig,
        chosen: MemoryConfig,
        training: TrainingConfig,
        blocks: Sequence[nn.Module],
        device: torch.device,
        host: Host,
    ) -> OomRecovery | None:
        """None where there is nothing to give: settings by hand, no checkpointing, or weights and activations that leave the device."""
        if asked.mode != "auto" or not training.gradient_checkpointing or chosen.moves or chosen.compile:
            return None
        return cls(blocks, chosen.checkpointing_interval, device, host)

    def helps(self, error: Exception) -> bool:
        """Whether it is memory that ran out, and more blocks can be computed again."""
        return is_out_of_memory(error) and self._next() is not None

    def take_(self) -> None:
        """Call it when the error is gone, for that holds what it was raised in."""
        interval = self._next()
        assert interval is not None
        store_blocks_(self.blocks)
        checkpoint_blocks_(self.blocks, interval)
        self.interval = interval
        gc.collect()
        empty_cache(self.device)
        again = len(places_to_recompute(len(self.blocks), interval))
        text = f"memory ran out: the step is begun anew with {again} of {len(self.blocks)} blocks computed again (interval {interval})"
        self.host.emit(Notice(text, "warning"))

    def _next(self) -> int | None:
        """The first interval that computes more blocks again."""
        now = len(places_to_recompute(len(self.blocks), self.interval))
        return next((n for n in INTERVALS if len(places_to_recompute(len(self.blocks), n)) > now), None)
