"""No quantisation: the base stays in the precision it was loaded in."""

from __future__ import annotations

from torch import nn


class KeepPrecision:
    """Leaves the model as it is, frozen."""

    extra = ""

    def missing(self) -> str:
        return ""

    def quantize_(self, transformer: nn.Module, keep: tuple[str, ...]) -> nn.Module:
        return transformer.requires_grad_(False)
