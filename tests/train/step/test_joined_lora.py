"""Layers that read the same input, computed together: what they give and learn is what each gives and learns alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, set_strength_, trainable_parameters
from chroma_trainer.trainer_core.adapters.layer import Dropout
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.memory import activation_offload
from chroma_trainer.trainer_core.memory.activation_offload import SavedOnHost
from chroma_trainer.trainer_core.models.projections import project
from chroma_trainer.trainer_core.train.step.joined_lora import JoinedLora, can_join
from chroma_trainer.trainer_core.train.step.working_copies import WorkingCopies
from torch import Tensor, nn

NAMES = ["q", "k", "v", "mlp"]
WIDTHS = (32, 32, 32, 128)


def model(dtype: torch.dtype = torch.bfloat16, kind: str = "lora", alpha: float = 2.5, bias: bool = True) -> Any:
    """Four layers of one input with adapters that are not zero."""
    parts = [nn.Linear(24, width, bias=bias) for width in WIDTHS]
    base = nn.ModuleDict(dict(zip(NAMES, parts, strict=True)))
    for i, parameter in enumerate(base.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    base = base.to(dtype).requires_grad_(False)
    layers = inject_(base, NAMES, 4, alpha, "default", torch.Generator().manual_seed(7), AdapterConfig(kind=kind))
    for _, parameter in trainable_parameters(layers):
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8))
    return base, layers


def outputs_and_gradients(base: Any, layers: Any, copies: WorkingCopies) -> list[Tensor]:
    """Outputs, gradient of the input, and gradients of the masters after two micro-batches."""
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(20)).bfloat16().requires_grad_()
    with copies.active():
        for factor in (1.0, 0.5):
            outputs = project([base[name] for name in NAMES], x)
            torch.stack([(output * factor).float().square().mean() for output in outputs]).sum().backward()
            copies.collect_()
    assert x.grad is not None
    gradients = [parameter.grad for _, parameter in trainable_parameters(layers)]
    return [*(output.detach() for output in outputs), x.grad, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("joins_bases", [False, True], ids=["bases apart", "bases joined"])
@pytest.mark.parametrize(("kind", "bias"), [("lora", True), ("rslora", False)])
def test_together_is_as_alone(kind, bias, joins_bases):
    base, layers = model(kind=kind, bias=bias)
    alone = outputs_and_gradients(base, layers, WorkingCopies(layers))
    base, layers = model(kind=kind, bias=bias)
    before = {name: base[name].base.weight.clone() for name in NAMES}
    group = [base[name] for name in NAMES]
    copies = WorkingCopies(layers, [group], joins_bases)
    with copies.active():
        assert isinstance(group[0].together, JoinedLora)
    together = outputs_and_gradients(base, layers, copies)
    assert len(together) == len(alone) == 4 + 1 + 8
    for one, other in zip(together, alone, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert float((one.float() - other.float()).norm()) <= 0.01 * float(other.float().norm())  # bf16 rounds by 0.004
    assert all(torch.equal(base[name].base.weight, weight) for name, weight in before.items())
    storages = {base[name].base.weight.untyped_storage().data_ptr() for name in NAMES}
    assert len(storages) == (1 if joins_bases else len(NAMES))


def test_bases_are_joined_again_after_the_model_was_elsewhere():
    base, layers = model(kind="lora", bias=True)
    copies = WorkingCopies(layers, [[base[name] for name in NAMES]], joins_bases=True)
    before = outputs_and_gradients(base, layers, copies)
    for layer in layers.values():  # as Module.to does for another device
        layer.base.weight.data, layer.base.bias.data = layer.base.weight.data.clone(), layer.base.bias.data.clone()
        for _, parameter in layer.trainable():
            parameter.grad = None
    copies.release_bases_()
    storages = {id(base[name].base.weight.untyped_storage()) for name in NAMES}
    copies.join_bases_()
    after = outputs_and_gradients(base, layers, copies)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)) and len(storages) > 1
    assert len({base[name].base.weight.untyped_storage().data_ptr() for name in NAMES}) == 1


def test_another_strength_is_computed_one_by_one():
    base, layers = model()
    group = [base[name] for name in NAMES]
    x = torch.ones(1, 24, dtype=torch.bfloat16)
    with WorkingCopies(layers, [group]).active():
        set_strength_(base, 0.0)
        assert all(torch.equal(y, layer.base(x)) for y, layer in zip(project(group, x), group, strict=True))


def test_what_is_joined():
    def group(**options: Any) -> Any:
        base, _ = model(**options)
        return [base[name] for name in NAMES]

    assert can_join(group()) and can_join(group(kind="rslora"))
    assert not can_join(group(kind="dora")) and not can_join(group(kind="loha"))
    assert not can_join(group(dtype=torch.float32))  # computes with its masters
    assert not can_join(group()[:1]) and not can_join([*group(), nn.Linear(24, 8)])
    dropping = group()
    dropping[1].dropout = Dropout(0.1, 0)
    assert not can_join(dropping)


def by_the_formula(layer: Any, x: Tensor) -> Tensor:
    """A LoRA layer of inputs with three axes, as it is written."""
    y, up = layer.base(x), layer.lora_B * layer.scale
    inner = torch.nn.functional.linear(x, layer.lora_A.to(x.dtype))
    return torch.addmm(y.flatten(0, -2), inner.flatten(0, -2), up.to(x.dtype).t()).view_as(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "part of a tensor"])
def test_views_change_no_bit_and_sums_keep_their_order(dtype, split):
    results = []
    for compute in (lambda group, x: [by_the_formula(layer, x) for layer in group], project):
        base, layers = model(dtype)
        whole = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(20)).to(dtype).requires_grad_()
        x = whole[:, 2:] if split else whole * 1
        assert x.is_contiguous() != split
        outputs = compute([base[name] for name in NAMES], x)
        torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
        gradients = [whole.grad, *(parameter.grad for _, parameter in trainable_parameters(layers))]
        results.append([*(output.detach() for output in outputs), *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("joins_bases", [False, True], ids=["bases apart", "bases joined"])
def test_weights_and_working_copies_are_no_activations(monkeypatch, joins_bases):
    """activation_offload moves what the forward pass saves, and not weights that were joined after the model was placed."""
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 0)
    base, layers = model()
    host = SavedOnHost(base.parameters())
    group = [base[name] for name in NAMES]
    copies = WorkingCopies(layers, [group], joins_bases)
    x, moved = torch.randn(2, 5, 24).bfloat16().requires_grad_(), []

    def pack(tensor: Tensor) -> Any:
        packed = host.pack(tensor)
        moved.extend([tuple(tensor.shape)] if packed is not tensor else [])
        return packed

    with copies.active(), torch.autograd.graph.saved_tensors_hooks(pack, host.unpack):
        project(group, x)
    assert moved and all(10 in shape for shape in moved)  # of 10 tokens
