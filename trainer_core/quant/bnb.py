"""bitsandbytes: 4-bit normal floats with twice quantised scales, and 8-bit integers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .contract import Quantizer
from .rows import RowScaled

BLOCK = 64
OUTER_BLOCK = 256  # inner scales that share an outer one


class Nf4Bnb(Quantizer):
    """Each 64 weights: 16 quantiles of a normal distribution, times their largest magnitude, which is kept in 8 bits itself.

    Source: Dettmers et al. 2023, arXiv:2305.14314.
    """

    extra = "bnb"

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        from bitsandbytes import functional

        exact = weight.float().contiguous()
        packed, state = functional.quantize_4bit(exact, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        outer = state.state2
        assert state.nested and outer is not None and outer.blocksize == OUTER_BLOCK and state.offset is not None
        return {
            "packed": packed,
            "absmax": state.absmax,
            "offset": state.offset.reshape(1),
            "outer_absmax": outer.absmax,
            "outer_code": outer.code.to(exact.device),
        }

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        from bitsandbytes import functional

        absmax = functional.dequantize_blockwise(
            stored["absmax"], absmax=stored["outer_absmax"], code=stored["outer_code"], blocksize=OUTER_BLOCK
        )
        state = functional.QuantState(
            absmax=absmax + stored["offset"], shape=torch.Size(shape), blocksize=BLOCK, quant_type="nf4", dtype=dtype
        )
        return functional.dequantize_4bit(stored["packed"], state)


class Int8Bnb(RowScaled):
    """The weights of LLM.int8(). Its products with rounded activations are not used: they serve inference.

    Source: Dettmers et al. 2022, arXiv:2208.07339.
    """

    extra = "bnb"

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        from bitsandbytes import functional

        codes, absmax, _ = functional.int8_vectorwise_quant(weight.half().contiguous())  # its kernels take fp16 only
        return {"codes": codes, "scale": absmax.float().reshape(-1, 1) / 127}
