"""fp8 with torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .rowwise import TINY, RowScaled, parts_of

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448


class Fp8Native(RowScaled):
    """codes = round_to_e4m3(W / scale), scale = max |row| / 448.

    The largest weight of each row becomes the largest float8.
    Source: Micikevicius et al. 2022, arXiv:2209.05433 (the e4m3 format).
    """

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        codes = torch.empty(weight.shape, dtype=FP8, device=weight.device)
        scale = torch.empty(len(weight), 1, device=weight.device)
        for rows in parts_of(weight):
            exact = weight[rows].to(torch.float32, copy=True)
            low, high = exact.aminmax(dim=1, keepdim=True)
            scale[rows] = (torch.maximum(-low, high) / FP8_MAX).clamp_(min=TINY)
            codes[rows] = exact.div_(scale[rows]).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
        return {"codes": codes, "scale": scale}
