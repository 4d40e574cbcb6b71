"""bitsandbytes: 4-bit normal floats with double quantization, and 8-bit integers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from .quantizer import Quantizer
from .rowwise import RowScaled

BLOCK = 64
NUM_CODES = 256  # values of an inner scale
OUTER_BLOCK = 256  # inner scales that share an outer one


def _functional() -> ModuleType:
    """Import the module by name, so that neither the import nor the type checker requires an optional package."""
    return importlib.import_module("bitsandbytes.functional")


class Nf4Bnb(Quantizer):
    """Each 64 weights: 16 quantiles of a normal distribution, times their largest magnitude, which is stored in 8 bits.

    Source: Dettmers et al. 2023, arXiv:2305.14314.
    """

    extra = "bnb"

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.is_meta:
            return _nf4_shapes(weight.numel())
        functional = _functional()
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
        if stored["packed"].is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        functional = _functional()
        absmax = functional.dequantize_blockwise(
            stored["absmax"], absmax=stored["outer_absmax"], code=stored["outer_code"], blocksize=OUTER_BLOCK
        )
        state = functional.QuantState(
            absmax=absmax + stored["offset"], shape=torch.Size(shape), blocksize=BLOCK, quant_type="nf4", dtype=dtype
        )
        return functional.dequantize_4bit(stored["packed"], state)


def _nf4_shapes(num_weights: int) -> dict[str, Tensor]:
    """Return the result of `encode` without data, because the package has no meta kernels."""
    num_blocks = -(-num_weights // BLOCK)

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return {
        "packed": meta((num_weights + 1) // 2, 1, dtype=torch.uint8),
        "absmax": meta(num_blocks, dtype=torch.uint8),
        "offset": meta(1, dtype=torch.float32),
        "outer_absmax": meta(-(-num_blocks // OUTER_BLOCK), dtype=torch.float32),
        "outer_code": meta(NUM_CODES, dtype=torch.float32),
    }


class Int8Bnb(RowScaled):
    """The weight format of LLM.int8().

    Its products with rounded activations are not used, because they are for inference.

    Source: Dettmers et al. 2022, arXiv:2208.07339.
    """

    extra = "bnb"

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        functional = _functional()
        codes, absmax, _ = functional.int8_vectorwise_quant(weight.half().contiguous())  # its kernels only support fp16
        return {"codes": codes, "scale": absmax.float().reshape(-1, 1) / 127}
