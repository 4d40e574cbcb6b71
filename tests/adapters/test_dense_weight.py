"""The dense weight is what the layer multiplies with, quantised or not."""

from __future__ import annotations

import pytest
import torch
from chroma_trainer.trainer_core.adapters.dense_weight import dense_weight, to_double
from chroma_trainer.trainer_core.registry import load, names
from torch import nn

from tests.narrowing import of_type


@pytest.mark.parametrize("level", names("quantization"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_matrix_the_layer_acts_by(level, dtype):
    quantizer = load("quantization", level)()
    if quantizer.missing():
        pytest.skip(quantizer.missing())
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(128, 64, dtype=dtype)})
    exact = model.get_parameter("layer.weight").detach().clone()
    quantizer.quantize_(model, keep=())
    layer = of_type(model["layer"], nn.Linear)
    weight = dense_weight(layer)
    assert type(weight) in (torch.Tensor, nn.Parameter)
    assert weight.shape == (64, 128) and weight.dtype == dtype and not weight.requires_grad
    rows = layer(torch.eye(128, dtype=dtype)).detach() - layer.bias.detach()
    torch.testing.assert_close(rows.t(), weight, rtol=0.02, atol=2e-3)
    assert (weight - exact).norm() / exact.norm() < 0.5


def test_of_a_plain_layer_nothing_is_copied():
    layer = nn.Linear(4, 3)
    assert dense_weight(layer).data_ptr() == layer.weight.data_ptr()


class WithoutDoubles(torch.Tensor):
    """As MPS has them."""

    def double(self, *_: object) -> torch.Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self, *_: object) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_fp64_is_computed_where_there_is_some():
    plain = torch.arange(6.0).view(2, 3)
    found = to_double(plain.as_subclass(WithoutDoubles))
    assert found.dtype == torch.float64 and torch.equal(found, plain.double())
