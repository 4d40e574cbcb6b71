"""The adapter's weights cast once a step: the same outputs, gradients and masters, to the bit."""

from __future__ import annotations

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.train.step.working_copies import WorkingCopies
from torch import nn

from tests.narrowing import present

KINDS = [("lora", "default"), ("rslora", "default"), ("dora", "default"), ("lora", "pissa")]


def model(dtype: torch.dtype, alpha: float, kind: str = "lora", init: str = "default"):
    """Two layers with an adapter that is not zero."""
    base = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 16))
    for i, parameter in enumerate(base.parameters()):
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    base = base.to(dtype).requires_grad_(False)
    layers = inject_(base, ["0", "2"], 4, alpha, init, torch.Generator().manual_seed(7), AdapterConfig(kind=kind))
    for _, parameter in trainable_parameters(layers):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8))
    return base, layers


def losses_and_gradients(base, layers, copies: WorkingCopies | None) -> list[torch.Tensor]:
    """Losses, and the gradients summed over three micro-batches."""
    losses = []
    for i in range(3):
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(20 + i)).to(base[0].base.weight.dtype)
        loss = base(x).float().square().mean()
        loss.backward()
        if copies:
            copies.collect_()
        losses.append(loss.detach())
    return [*losses, *(present(parameter.grad) for _, parameter in trainable_parameters(layers))]


@pytest.mark.parametrize(("kind", "init"), KINDS)
@pytest.mark.parametrize("alpha", [4.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_same_bits(dtype, alpha, kind, init):
    plain = losses_and_gradients(*model(dtype, alpha, kind, init), None)
    base, layers = model(dtype, alpha, kind, init)
    copies = WorkingCopies(layers)
    with copies.active():
        takes_part = dtype != torch.float32 and init == "default"
        assert all((layer.working is not None) == takes_part for layer in layers.values())
        found = losses_and_gradients(base, layers, copies)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
    assert all(layer.working is None for layer in layers.values())


def test_they_follow_the_masters():
    base, layers = model(torch.bfloat16, 4.0)
    copies, x = WorkingCopies(layers), torch.ones(1, 24, dtype=torch.bfloat16)
    with torch.no_grad():
        for factor in (1.0, 3.0):
            for _, parameter in trainable_parameters(layers):
                parameter.mul_(factor)
            with copies.active():
                inside = base(x)
            assert torch.equal(inside, base(x))


def test_what_broke_off_leaves_no_gradient():
    base, layers = model(torch.bfloat16, 4.0)
    copies = WorkingCopies(layers)
    with pytest.raises(RuntimeError), copies.active():
        base(torch.ones(1, 24, dtype=torch.bfloat16)).float().sum().backward()
        raise RuntimeError
    with copies.active():
        copies.collect_()
    assert all(parameter.grad is None for _, parameter in trainable_parameters(layers))


def test_a_strength_of_zero_is_the_base():
    base, layers = model(torch.bfloat16, 4.0)
    x = torch.ones(1, 24, dtype=torch.bfloat16)
    for layer in layers.values():
        layer.strength = 0.0
    with WorkingCopies(layers).active():
        assert torch.equal(base[0](x), layers["0"].base(x))
