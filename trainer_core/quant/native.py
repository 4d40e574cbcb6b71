"""fp8 with torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .rowwise import TINY, RowScaled

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448


class Fp8Native(RowScaled):
    """codes = round_to_e4m3(W / scale), scale = max |row| / 448.

    The largest weight of each row becomes the largest float8.
    Source: Micikevicius et al. 2022, arXiv:2209.05433 (the e4m3 format).
    """

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        exact = weight.float()
        scale = (exact.abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp(min=TINY)
        return {"codes": (exact / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), "scale": scale}
