"""rsLoRA: LoRA scaled by alpha / sqrt(rank), so that high ranks train as fast as low ones. Its files are LoRA files.

Source: Kalajdzievski 2023, arXiv:2312.03732.
"""

from __future__ import annotations

import math

from .lora import LoraLinear


class RsLoraLinear(LoraLinear):
    """y = W x + b + (alpha / sqrt(rank)) B A x"""

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.rank)
