"""fp8 with torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .rowwise import RowScaled, encode_rows

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448


class Fp8Native(RowScaled):
    """codes = round_to_e4m3(W / scale), scale = max |row| / 448.

    The largest weight of each row becomes the largest float8.
    Source: Micikevicius et al. 2022, arXiv:2209.05433 (the e4m3 format).
    """

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return encode_rows(weight, FP8_MAX, FP8)
