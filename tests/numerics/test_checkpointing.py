"""Gradient checkpointing changes memory, not numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.families.checkpointing import checkpoint_blocks_, store_blocks_
from chroma_trainer.trainer_core.lora.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.lora.targets import resolve_targets
from chroma_trainer.trainer_core.registry import load, names

FAMILY: Any = None  # of the test that runs


@pytest.fixture(params=names("family"))
def tiny_model(request, monkeypatch):
    """Of each family."""
    monkeypatch.setitem(globals(), "FAMILY", load("family", request.param)())
    return request.getfixturevalue(f"tiny_{request.param}_model")




def loss_and_gradients(transformer, layers, text):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(len(text), 16, 8, 6, generator=generator)
    velocity = FAMILY.predict(transformer, x, torch.linspace(0.2, 0.8, len(text)), text)
    loss = velocity.square().mean()
    return loss, torch.autograd.grad(loss, [parameter for _, parameter in trainable_parameters(layers)])


def prepared(tiny_model, level):
    transformer = FAMILY.load_transformer(tiny_model)
    load("quantization", level)().quantize_(transformer, FAMILY.full_precision)
    layers = inject_(
        transformer, resolve_targets(transformer, FAMILY, "all+ffs"), 4, 4, generator=torch.Generator().manual_seed(1)
    )
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return transformer, layers


@pytest.mark.parametrize("level", ["none", "int8-quanto"])
@pytest.mark.parametrize("lengths", [(5,), (5, 5), (3, 9)], ids=["one", "equal", "mixed"])
def test_same_loss_and_gradients_to_the_last_bit(tiny_model, level, lengths):
    """With a mask (mixed lengths) as well, which diffusers' own switch loses in single blocks."""
    transformer, layers = prepared(tiny_model, level)
    text = [torch.randn(length, 32, generator=torch.Generator().manual_seed(length)) for length in lengths]
    loss, plain = loss_and_gradients(transformer, layers, text)
    checkpoint_blocks_(FAMILY.blocks(transformer))
    loss_again, recomputed = loss_and_gradients(transformer, layers, text)
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_blocks_run_twice_with_grad_once_without_and_can_be_undone(tiny_model):
    transformer, layers = prepared(tiny_model, "none")
    calls = []
    for block in FAMILY.blocks(transformer):
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    text = [torch.randn(5, 32)]
    num_blocks = len(FAMILY.blocks(transformer))

    def count(run) -> int:
        calls.clear()
        run()
        return len(calls)

    checkpoint_blocks_(FAMILY.blocks(transformer))
    checkpoint_blocks_(FAMILY.blocks(transformer))  # twice is once
    assert count(lambda: loss_and_gradients(transformer, layers, text)) == 2 * num_blocks
    with torch.no_grad():
        assert count(lambda: FAMILY.predict(transformer, torch.zeros(1, 16, 8, 6), torch.ones(1), text)) == num_blocks
    store_blocks_(FAMILY.blocks(transformer))
    assert count(lambda: loss_and_gradients(transformer, layers, text)) == num_blocks


def test_fewer_activations_are_kept(tiny_model):
    transformer, _ = prepared(tiny_model, "none")
    text = [torch.randn(5, 32)]

    def saved_bytes() -> int:
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            FAMILY.predict(transformer, torch.zeros(1, 16, 16, 16), torch.ones(1), text)
        return total

    plain = saved_bytes()
    checkpoint_blocks_(FAMILY.blocks(transformer))
    assert saved_bytes() < plain / 3
