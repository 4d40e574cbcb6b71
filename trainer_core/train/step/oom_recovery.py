"""Recover from out of memory in a step: recompute more blocks in the backward pass, and retry the step.

Applies only where memory mode auto chose to store activations, and the plan was too optimistic. The randomness of a
step depends on its number alone, and no weight has changed yet. A run that recovers therefore has the same bytes as one
that never ran out of memory.
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
    """Fallback to more activation checkpointing.

    Args:
        blocks: the transformer's blocks.
        interval: every `interval`-th block is recomputed at present.
    """

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
        """Return the recovery of a run, or None where it can't free memory.

        That is with manual memory settings, without checkpointing, with compiled blocks, and where weights or
        activations leave the device.

        Args:
            asked: memory settings of the request.
            chosen: memory settings that are applied.
        """
        if asked.mode != "auto" or not training.gradient_checkpointing or chosen.moves or chosen.compile:
            return None
        return cls(blocks, chosen.checkpointing_interval, device, host)

    def helps(self, error: Exception) -> bool:
        """Return whether the error is out of memory and more blocks can be recomputed."""
        return is_out_of_memory(error) and self._next() is not None

    def take_(self) -> None:
        """Recompute more blocks from now on.

        Call it after the except block: the exception references the frames, and with them the stored activations.
        """
        interval = self._next()
        assert interval is not None
        store_blocks_(self.blocks)
        checkpoint_blocks_(self.blocks, interval)
        self.interval = interval
        gc.collect()
        empty_cache(self.device)
        num_recomputed = len(places_to_recompute(len(self.blocks), interval))
        text = (
            f"out of memory: the step is retried with {num_recomputed} of {len(self.blocks)} blocks recomputed in the "
            f"backward pass (interval {interval})"
        )
        self.host.emit(Notice(text, "warning"))

    def _next(self) -> int | None:
        """Return the first interval that recomputes more blocks; None where all are recomputed."""
        num_now = len(places_to_recompute(len(self.blocks), self.interval))
        return next((n for n in INTERVALS if len(places_to_recompute(len(self.blocks), n)) > num_now), None)
