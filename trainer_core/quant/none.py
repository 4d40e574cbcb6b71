"""No quantisation: the base stays in the precision it was loaded in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .quantizer import Quantizer


class KeepPrecision(Quantizer):
    """Leaves every layer as it is."""

    is_plain = True

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight}

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return stored["weight"].to(dtype)

    def layer(self, linear: nn.Linear, device: torch.device | None = None) -> nn.Linear:
        return linear
