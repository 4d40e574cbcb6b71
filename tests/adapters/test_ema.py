"""The average of the weights: its formula, its way into a checkpoint and back, and that training does not feel it."""

from __future__ import annotations

import pytest
import torch
from chroma_trainer.trainer_core.adapters.ema import Ema
from chroma_trainer.trainer_core.adapters.inject import adapter_state, inject_
from torch import nn


def layers_of(seed: int = 0):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).requires_grad_(False)
    return inject_(model, ["0", "1"], 2, 2.0, generator=torch.Generator().manual_seed(seed))


def step_(layers, i: int) -> None:
    draw = torch.Generator().manual_seed(i)
    with torch.no_grad():
        for layer in layers.values():
            for _, parameter in layer.trainable():
                parameter.add_(torch.randn(parameter.shape, generator=draw))


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_the_formula(decay):
    layers = layers_of()
    ema = Ema(layers, decay)
    down = layers["0"].get_parameter("lora_A")
    wanted = down.detach().double()
    for n in range(20):
        step_(layers, n)
        ema.update_(layers)
        d = min(decay, (1 + n) / (10 + n))
        wanted = d * wanted + (1 - d) * down.detach().double()
    torch.testing.assert_close(ema.averages["0.lora_A"].double(), wanted, rtol=1e-5, atol=1e-6)


def test_going_on_from_its_state_is_going_on():
    whole, cut = layers_of(), layers_of()
    ema, first = Ema(whole, 0.9), Ema(cut, 0.9)
    for n in range(8):
        step_(whole, n)
        ema.update_(whole)
        if n < 5:
            step_(cut, n)
            first.update_(cut)
    again = Ema(layers_of(seed=9), 0.9)
    again.load_ema_state_(first.ema_state())
    for n in range(5, 8):
        step_(cut, n)
        again.update_(cut)
    one, two = ema.ema_state(), again.ema_state()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_applied_brings_the_averages_and_then_every_bit_back():
    layers = layers_of()
    ema = Ema(layers, 0.9)
    step_(layers, 0)
    ema.update_(layers)
    trained, averages = adapter_state(layers), ema.ema_state()
    with pytest.raises(KeyError), ema.applied(layers):
        inside = adapter_state(layers)
        assert all(torch.equal(inside[name], averages[name]) for name in inside)
        with ema.applied(layers):
            pass
        assert torch.equal(layers["0"].get_parameter("lora_A"), averages["0.lora_A"])
        raise KeyError
    now = adapter_state(layers)
    assert all(torch.equal(now[name], trained[name]) for name in now)


def test_the_average_is_fp32_beside_narrow_weights():
    layers = layers_of()
    for layer in layers.values():
        down = layer.get_parameter("lora_A")
        down.data = down.data.bfloat16()
    ema = Ema(layers, 0.5)
    ema.update_(layers)
    assert all(average.dtype == torch.float32 for average in ema.averages.values())
    with ema.applied(layers):
        assert layers["0"].lora_A.dtype == torch.bfloat16


def test_the_state_is_of_these_layers():
    with pytest.raises(AssertionError, match="other layers"):
        Ema(layers_of(), 0.9).load_ema_state_({"num_updates": torch.tensor(1)})
