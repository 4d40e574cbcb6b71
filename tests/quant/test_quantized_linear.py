"""The quantised layer: moves, types, states, and what it keeps for the backward pass."""

from __future__ import annotations

import pytest
import torch
from chroma_trainer.trainer_core.quant.quantized_linear import QuantizedLinear
from chroma_trainer.trainer_core.quant.quanto import Int4Quanto, Int8Quanto
from torch import nn

from tests.narrowing import of_type


def pair(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Linear, QuantizedLinear]:
    torch.manual_seed(0)
    layer = nn.Linear(256, 64, dtype=dtype, bias=bias)
    return layer, of_type(Int8Quanto().layer(layer), QuantizedLinear)


@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradient_are_those_of_the_decoded_weight(bias):
    plain, layer = pair(bias=bias)
    x, y = torch.randn(2, 3, 256, requires_grad=True), torch.randn(2, 3, 64)
    dense = nn.functional.linear(x, layer.weight, plain.bias)
    (expected,) = torch.autograd.grad(dense, x, y)
    ours = layer(x)
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(torch.autograd.grad(ours, x, y)[0], expected)


def test_gradients_by_finite_differences():
    layer = pair()[1].double()
    x = torch.randn(2, 256, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_the_backward_pass_waits_for_nothing_of_full_size():
    layer = pair()[1]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(1, 256, requires_grad=True))
    assert saved and not [t for t in saved if t.numel() == 64 * 256 and t.element_size() > 1]


def test_other_types_change_the_bias_and_leave_the_bits():
    layer = pair()[1]
    before = {name: tensor.clone() for name, tensor in layer.stored.items()}
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    for name, tensor in layer.stored.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    layer.to("cpu").half()
    assert layer.dtype == torch.float16 and layer.scale.dtype == torch.float32


def test_it_moves_to_the_meta_device_and_loads_back():
    layer = pair()[1]
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(2, 256)
    before = layer(x)
    layer.to("meta")
    assert all(p.is_meta for p in layer.parameters()) and layer.weight.is_meta
    layer.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(layer(x), before)


def test_it_compiles_as_one_graph():
    layer = pair()[1]
    x = torch.randn(2, 256, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    ours, plain = compiled(x), layer(x)
    assert torch.equal(ours, plain)
    assert torch.equal(torch.autograd.grad(ours.sum(), x)[0], torch.autograd.grad(plain.sum(), x)[0])


@pytest.mark.parametrize("quantizer", [Int8Quanto, Int4Quanto])
def test_it_compiles_where_its_input_needs_no_gradient(quantizer):
    """As a modulation does, and the first block of a LoRA training. torch (2.6 to 2.13) traces an autograd function there
    without its context if its tensors happen to be as many as its parameters."""
    torch._dynamo.reset()
    layer, x = quantizer().layer(nn.Linear(256, 64)), torch.randn(2, 3, 256)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    assert not layer(x).requires_grad


def test_no_gradient_where_none_is_asked():
    layer = pair()[1]
    assert not layer(torch.randn(2, 256)).requires_grad
    assert "Int8Quanto" in repr(layer) and "in_features=256" in repr(layer)


def test_patterns_are_kept():
    model = nn.ModuleDict({f"block{i}": nn.Linear(32, 32) for i in range(4)})
    assert Int4Quanto().quantize_(model, keep=("block1", "*3")) is model
    names = [type(module).__name__ for module in model.values()]
    assert names == ["QuantizedLinear", "Linear", "QuantizedLinear", "Linear"]
