"""int8 by optimum-quanto: how far off, how small, and never the whole model twice."""

from __future__ import annotations

import pytest
import torch
from chroma_trainer.trainer_core.quant.quanto import Int8Quanto
from torch import nn


def blocks(num_blocks: int = 4, width: int = 128, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({f"block{i}": nn.Linear(width, width, dtype=dtype) for i in range(num_blocks)}).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_has_its_own_scale_and_is_off_by_half_a_step_at_most(dtype):
    model = blocks(1, dtype=dtype)
    with torch.no_grad():
        model["block0"].weight.mul_(torch.logspace(-3, 2, 128)[:, None])  # rows of very different size
    weight = model["block0"].weight.detach().float().clone()
    Int8Quanto().quantize_(model, keep=())
    quantised = model["block0"].weight.dequantize().float()
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    slack = 0.501 if dtype == torch.float32 else 1.5  # the scale itself is rounded to bf16, up to 127 * 2^-9 steps
    assert ((quantised - weight).abs() <= slack * step).all()


def test_one_byte_a_weight():
    model = blocks(1, width=512)
    Int8Quanto().quantize_(model, keep=())
    weight = model["block0"].weight
    assert weight._data.dtype == torch.int8
    assert weight._data.numel() + weight._scale.numel() * weight._scale.element_size() < 1.01 * 512 * 512


def test_patterns_are_kept():
    model = blocks()
    Int8Quanto().quantize_(model, keep=("block1", "*3"))
    assert [type(module).__name__ for module in model.values()] == ["QLinear", "Linear", "QLinear", "Linear"]


def test_layer_by_layer():
    """When a layer is quantised, those before it no longer hold their full weights: peak memory is bounded."""
    model = blocks(6)
    full = [module.weight.untyped_storage().data_ptr() for module in model.values()]
    seen: list[int] = []

    class Watch(nn.Module):
        def named_modules(self, *args, **kwargs):
            return model.named_modules(*args, **kwargs)

        def get_submodule(self, name):
            alive = sum(type(module) is nn.Linear for module in model.values())
            seen.append(alive)
            return model.get_submodule(name)

    Int8Quanto().quantize_(Watch(), keep=())
    assert seen == [6, 5, 4, 3, 2, 1] and len(full) == 6


def test_gradients_flow_through_to_the_input():
    model = blocks(1)
    x = torch.randn(3, 128, requires_grad=True)
    weight = model["block0"].weight.detach().clone()
    Int8Quanto().quantize_(model, keep=())
    model["block0"](x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), rtol=0.02, atol=0.02)
    assert not [p for p in model.parameters() if p.requires_grad]


def test_it_is_installed():
    assert Int8Quanto().missing() == ""
