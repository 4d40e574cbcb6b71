"""torchao's 8-bit weight-only formats.

Its tensor classes can only be saved with pickle, so the plain tensors in them are extracted. Only weights are
quantized: with activations rounded to int8 as well, the LoRA's gradient was off by 40 % (torchao 0.18), and fp8 matrix
products need compute capability 8.9, while these formats run anywhere.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import Tensor, nn

from .rowwise import RowScaled


class _Torchao8(RowScaled):
    extra = "torchao"
    config = ""

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns about kernels that are not needed here
        quantization = importlib.import_module("torchao.quantization")

        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.float(), requires_grad=False)
        options = getattr(quantization, self.config)(set_inductor_config=False)
        quantization.quantize_(holder := nn.Sequential(layer), options)
        stored: Any = holder[0].weight
        zero_point = getattr(stored, "zero_point", None)
        if zero_point is not None and not weight.is_meta:
            assert not zero_point.any(), "torchao rounded symmetrically up to 0.18"
        return {"codes": stored.qdata, "scale": stored.scale.to(torch.float32).reshape(-1, 1)}


class Int8Torchao(_Torchao8):
    """W ~ scale * codes, codes in int8."""

    config = "Int8WeightOnlyConfig"


class Fp8Torchao(_Torchao8):
    """W ~ scale * codes, codes in float8_e4m3fn."""

    config = "Float8WeightOnlyConfig"
