"""Weights go to the device layer by layer, and a load can be canceled between two layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chroma_trainer.benchmarks.quantizing import peak_bytes
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.errors import Cancelled
from chroma_trainer.trainer_core.host import Paths, SinkHost
from chroma_trainer.trainer_core.models.chroma.family import ChromaFamily
from chroma_trainer.trainer_core.quant.loading import load_base
from chroma_trainer.trainer_core.setup.placement import load_text_encoder
from torch import nn

FAMILY = ChromaFamily()
CPU, META = torch.device("cpu"), torch.device("meta")


def host_at(folder, cancelled: bool = False) -> SinkHost:
    return SinkHost(paths=Paths(output=folder, cache=folder), is_cancelled=lambda: cancelled)


def linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def in_ram(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.is_meta)


@pytest.mark.parametrize("level", ["none", "int8-quanto"])
def test_a_base_that_goes_to_the_device_is_never_whole_in_ram(tiny_model, tmp_path, level):
    """fp32 in the file, bf16 in the run: each layer is read, converted and moved alone. Here the device is torch's meta."""
    model = replace(tiny_model, dtype="bf16", quantization=QuantizationConfig(level, "cpu", cached_bases=0))

    def load(resident: bool) -> nn.Module:
        return load_base(FAMILY, model, host_at(tmp_path), META, resident)

    here, there = load(False), load(True)
    assert in_ram(here) > 3 * in_ram(there)
    assert all(p.is_meta for p in linears(there)["transformer_blocks.0.attn.to_q"].parameters())
    largest = max(sum(p.numel() * 4 for p in layer.parameters()) for layer in linears(here).values())
    assert peak_bytes(lambda: load(True)) < in_ram(there) + 4 * largest


def test_the_same_bits_however_they_are_read(tiny_model, tmp_path):
    model = replace(tiny_model, dtype="fp16")
    mapped = FAMILY.load_transformer(model).state_dict()
    read = FAMILY.load_transformer(model, lambda name, linear: linear).state_dict()
    assert mapped.keys() == read.keys() and all(torch.equal(mapped[name], read[name]) for name in mapped)


def test_a_converted_tensor_is_not_mapped(tiny_model):
    """Mapped pages of the file would stay beside the converted weights: a Chroma in fp8 took 8.9 GB more."""
    same, converted = (FAMILY.load_transformer(replace(tiny_model, dtype=dtype)) for dtype in ("fp32", "bf16"))
    wide = same.get_parameter("single_transformer_blocks.0.proj_mlp.weight")
    assert wide.untyped_storage().nbytes() > wide.numel() * 4 or not wide.untyped_storage().resizable()
    narrow = converted.get_parameter("single_transformer_blocks.0.proj_mlp.weight")
    assert narrow.untyped_storage().nbytes() == narrow.numel() * 2


@pytest.mark.parametrize("level", ["int8-quanto", "none"])
def test_loading_can_be_canceled(workshop, tiny_model, tmp_path, level):
    """SIGTERM while T5 was quantized was heard only after its last layer."""
    host = host_at(tmp_path, cancelled=True)
    model = replace(tiny_model, quantization=QuantizationConfig(level, text_encoder=level))
    request = replace(workshop.request(model=model), memory=MemoryConfig())
    with pytest.raises(Cancelled):
        load_text_encoder(FAMILY, request, CPU if level != "none" else META, host)
    with pytest.raises(Cancelled):
        load_base(FAMILY, model, host, META, resident=True)
