"""A quantised text encoder: nearly the same text, under keys of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.quant.loading import text_converter, text_identity
from chroma_trainer.trainer_core.quant.packages import missing_for
from chroma_trainer.trainer_core.quant.quantized_linear import QuantizedLinear
from chroma_trainer.trainer_core.registry import names
from torch import nn

FAMILY = ChromaFamily()
CPU = torch.device("cpu")
PROMPTS = ["a red cat", "the blue dog of the photo"]


def encoder(model, level: str):
    config = QuantizationConfig(text_encoder=level)
    return FAMILY.load_text_encoder(model, CPU, text_converter(config, CPU))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("level", ["int8-quanto", "fp8-native"])
def test_nearly_the_same_text(tiny_model, level, dtype):
    model = replace(tiny_model, dtype=dtype)
    quantised = encoder(model, level)
    linears = [m for m in quantised.model.modules() if isinstance(m, nn.Linear)]
    assert linears and all(isinstance(m, QuantizedLinear) for m in linears)
    for ours, plain in zip(quantised.encode(PROMPTS), encoder(model, "none").encode(PROMPTS), strict=True):
        assert ours.shape == plain.shape and ours.dtype == plain.dtype and not torch.equal(ours, plain)
        assert (ours.float() - plain.float()).norm() < 0.06 * plain.float().norm()


def test_every_weight_is_decoded_once_for_a_prompt(tiny_model, monkeypatch):
    """transformers' T5 asks for the precision of one of them several times."""
    quantised = encoder(tiny_model, "int8-quanto")
    layers = [m for m in quantised.model.modules() if isinstance(m, QuantizedLinear)]
    kind, seen = type(layers[0].format), []
    decode = kind.decode
    monkeypatch.setattr(kind, "decode", lambda self, *rest: seen.append(1) or decode(self, *rest))
    quantised.encode(PROMPTS[:1])
    assert len(seen) == len(layers)


def test_every_level_has_a_key_of_its_own(tiny_model):
    keys = {
        level: text_identity(FAMILY, replace(tiny_model, quantization=QuantizationConfig(text_encoder=level)))
        for level in names("quantization")
        if not missing_for(level)
    }
    assert len(set(keys.values())) == len(keys)
    assert keys["none"] == FAMILY.identity(tiny_model, "text_encoder")  # embeddings that are cached already stay good


def test_the_bases_level_does_not_touch_the_text(tiny_model):
    model = replace(tiny_model, quantization=QuantizationConfig("int4-quanto"))
    assert text_identity(FAMILY, model) == text_identity(FAMILY, tiny_model)
    assert text_converter(model.quantization, CPU) is None
