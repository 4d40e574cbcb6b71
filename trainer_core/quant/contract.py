"""What a quantisation backend brings: one file and one registry line."""

from __future__ import annotations

from typing import Protocol

from torch import nn


class Quantizer(Protocol):
    """Stores the weights of a frozen base in fewer bits."""

    extra: str  # name of the optional extra that brings its package, "" for none

    def missing(self) -> str:
        """'' where it can run here, else what is missing and how to get it."""
        ...

    def quantize_(self, transformer: nn.Module, keep: tuple[str, ...]) -> nn.Module:
        """Quantise the Linear weights in place, block by block, but for modules whose name matches a pattern of `keep`.

        Runs before a LoRA is injected: afterwards nothing of the base requires a gradient.
        """
        ...
