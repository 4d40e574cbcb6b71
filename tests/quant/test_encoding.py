"""Weights are encoded part by part and in place: the same codes as by the formula, few temporaries, the weight unchanged."""

from __future__ import annotations

import pytest
import torch
from chroma_trainer.benchmarks.quantizing import CASES, peak_bytes
from chroma_trainer.trainer_core.quant import rowwise


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).mul_(0.02)
    weight[0] = 0.0  # no scale
    weight[1] = 0.5  # a group of equal weights
    weight[2, 0] = -30.0
    return weight.to(dtype)


@pytest.mark.parametrize("level", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_the_formula(level, dtype, monkeypatch):
    ours, plain = CASES[level]
    for shape in ((7, 256), (64, 96), (5, 8)):
        weight = weight_of(shape, dtype)
        before, expected = weight.clone(), plain(weight)
        for part in (1, 300, 1 << 20):  # a row, some rows, all
            monkeypatch.setattr(rowwise, "PART_WEIGHTS", part)
            stored = ours(weight)
            assert torch.equal(weight, before)  # also where it is fp32 already
            assert stored.keys() == expected.keys()
            for name, tensor in expected.items():
                assert stored[name].dtype == tensor.dtype and stored[name].shape == tensor.shape
                assert torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8))
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in ours(weight.to("meta")).items()}
        assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}


@pytest.mark.parametrize("level", CASES)
def test_few_temporaries(level, monkeypatch):
    """At most as much as the result takes, and a part: the plain formula takes 12 bytes per weight."""
    monkeypatch.setattr(rowwise, "PART_WEIGHTS", 1 << 12)
    weight = weight_of((512, 1024), torch.bfloat16)
    ours, plain = (peak_bytes(lambda call=call: call(weight)) for call in CASES[level])
    assert ours < 2.2 * weight.numel() and plain > 8 * weight.numel()
