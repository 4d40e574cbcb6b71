"""The LoRA layer: its formula, its starts, and that the base is untouched."""

from __future__ import annotations

import math

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import (
    LoraLinear,
    adapter_state,
    inject_,
    load_adapter_state_,
    lora_layers,
    remove_,
    set_strength_,
    trainable_parameters,
)
from torch import nn

from tests.narrowing import of_type, present


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8, bias=False)).requires_grad_(False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise_(layers) -> None:
    for layer in layers.values():
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator(7)))


def test_the_formula():
    base = nn.Linear(12, 20, dtype=torch.float64)
    layer = LoraLinear(base, rank=3, alpha=6.0).double()
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    weight = base.weight + 6.0 / 3 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, base.bias), rtol=1e-12, atol=1e-12)


def test_gradients_are_right():
    layer = LoraLinear(nn.Linear(4, 5, dtype=torch.float64).requires_grad_(False), rank=2, alpha=3.0).double()
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, a, b: torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,)),
        (x, layer.lora_A, layer.lora_B),
    )


def test_a_new_lora_changes_nothing_and_only_it_learns():
    model, x = small_model(), torch.randn(4, 12)
    before = model(x)
    layers = inject_(model, ["0", "2"], rank=4, alpha=4, generator=generator())
    assert torch.equal(model(x), before)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning == [name for name, _ in trainable_parameters(layers)]
    assert learning == ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"]
    assert list(lora_layers(model)) == ["0", "2"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_stay_fp32_beside_a_narrow_base(dtype):
    model = small_model().to(dtype)
    layers = inject_(model, ["0"], rank=4, alpha=4, generator=generator())
    randomise_(layers)
    x = torch.randn(4, 12, dtype=dtype)
    model(x).float().sum().backward()
    assert model(x).dtype == dtype
    down = layers["0"].get_parameter("lora_A")
    assert down.dtype == present(down.grad).dtype == torch.float32


def test_alpha_is_in_b_before_it_is_rounded():
    """As in the exported file, so that training and inference round the same number."""
    model = small_model().bfloat16()
    layers = inject_(model, ["0"], rank=3, alpha=1.0, generator=generator())
    randomise_(layers)
    layer, x = of_type(layers["0"], LoraLinear), torch.randn(4, 12, dtype=torch.bfloat16)
    narrow = (layer.lora_B * (1.0 / 3)).bfloat16()
    expected = torch.addmm(layer.base(x), x @ layer.lora_A.bfloat16().t(), narrow.t())
    assert torch.equal(layer(x), expected)


def test_strength_scales_and_zero_is_the_base_exactly():
    model, x = small_model(), torch.randn(4, 12)
    base = model(x)
    layers = inject_(model, ["2"], rank=4, alpha=8, generator=generator())
    randomise_(layers)
    whole = model(x) - base
    set_strength_(model, 0.5)
    torch.testing.assert_close(model(x) - base, whole / 2)
    set_strength_(model, 0.0)
    assert torch.equal(model(x), base)
    set_strength_(model, 1.0)
    torch.testing.assert_close(model(x) - base, whole)


def test_remove_gives_the_base_back():
    model, x = small_model(), torch.randn(4, 12)
    base = model(x)
    randomise_(inject_(model, ["0", "2"], rank=4, alpha=8, generator=generator()))
    remove_(model)
    assert torch.equal(model(x), base)
    assert [type(module) for module in model] == [nn.Linear, nn.GELU, nn.Linear]


def test_the_same_seed_gives_the_same_start():
    first, second, other = (inject_(small_model(), ["0", "2"], 4, 4, generator=generator(seed)) for seed in (1, 1, 2))
    downs = [
        {name: layer.get_parameter("lora_A") for name, layer in layers.items()} for layers in (first, second, other)
    ]
    assert all(torch.equal(downs[0][name], downs[1][name]) for name in first)
    assert not torch.equal(downs[0]["0"], downs[2]["0"])


def test_default_start_is_uniform_in_one_over_root_of_in():
    """Kaiming-uniform with a = sqrt(5): the bound is sqrt(6 / ((1 + 5) in))."""
    model = nn.Sequential(nn.Linear(64, 64))
    a = inject_(model, ["0"], rank=256, alpha=4, generator=generator())["0"].get_parameter("lora_A")
    bound = 1 / math.sqrt(64)
    assert a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert a.mean().item() == pytest.approx(0, abs=0.002)


def test_gaussian_start_has_deviation_one_over_rank():
    model = nn.Sequential(nn.Linear(256, 64))
    a = inject_(model, ["0"], rank=64, alpha=4, init="gaussian", generator=generator())["0"].get_parameter("lora_A")
    assert a.std().item() == pytest.approx(1 / 64, rel=0.02)


def test_state_goes_out_and_in():
    layers = inject_(small_model(), ["0", "2"], 4, 4, generator=generator())
    randomise_(layers)
    state = adapter_state(layers)
    up = layers["0"].get_parameter("lora_B")
    up.data.zero_()
    assert state["0.lora_B"].abs().sum() > 0  # a copy
    load_adapter_state_(layers, state)
    assert torch.equal(up, state["0.lora_B"])
    with pytest.raises(AssertionError, match="other layers"):
        load_adapter_state_(layers, {"0.lora_A": state["0.lora_A"]})


def test_only_linears_take_a_lora():
    with pytest.raises(AssertionError, match="1 is a GELU"):
        inject_(small_model(), ["1"], 4, 4)
