"""Gradient checkpointing changes memory, not numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.memory import activation_checkpointing as checkpointing
from chroma_trainer.trainer_core.memory.activation_checkpointing import (
    checkpoint_blocks_,
    places_to_recompute,
    store_blocks_,
)
from chroma_trainer.trainer_core.registry import load, names
from torch.utils.flop_counter import FlopCounterMode

FAMILY: Any = None  # of the test that runs
NOISY = {"chroma": (16, 8, 6), "flux": (16, 8, 6), "radiance": (3, 64, 48)}  # latents or pixels of 12 tokens


@pytest.fixture(params=names("family"))
def tiny_model(request, monkeypatch):
    """Of each family."""
    monkeypatch.setitem(globals(), "FAMILY", load("family", request.param)())
    return request.getfixturevalue(f"tiny_{request.param}_model")


def loss_and_gradients(transformer, layers, text):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(len(text), *NOISY[FAMILY.name], generator=generator)
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
        torch.nn.init.normal_(layer.get_parameter("lora_B"), std=0.05)
    return transformer, layers


@pytest.mark.parametrize("level", [pytest.param("none", marks=pytest.mark.slow), "int8-quanto"])
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


EVERYTHING = "x_embedder, context_embedder, transformer_blocks.*, single_transformer_blocks.*, proj_out"
OF_FLUX = ", time_text_embed.*, norm_out.linear"  # gates that learn: their gradients read what is gated


@pytest.mark.parametrize("kind", names("adapter"))
@pytest.mark.parametrize(
    "targets",
    [pytest.param("all", marks=pytest.mark.slow), pytest.param("ai-toolkit", marks=pytest.mark.slow), "everything"],
)
def test_what_no_gradient_reads_is_all_that_is_left_out(tiny_model, kind, targets):
    transformer = FAMILY.load_transformer(tiny_model)
    if targets == "everything":
        targets = EVERYTHING + (OF_FLUX if FAMILY.name == "flux" else "")
        if FAMILY.name == "radiance":  # its ends work on pixels, and are not trained
            targets = targets.replace("x_embedder, ", "", 1).removesuffix(", proj_out")
    draw = torch.Generator().manual_seed(1)
    layers = inject_(
        transformer,
        resolve_targets(transformer, FAMILY, targets),
        4,
        4,
        generator=draw,
        config=AdapterConfig(kind=kind),
    )
    for _, parameter in trainable_parameters(layers):
        torch.nn.init.normal_(parameter, std=0.05, generator=draw)
    text = [torch.randn(7, 32, generator=draw), torch.randn(7, 32, generator=draw)]
    _, plain = loss_and_gradients(transformer, layers, text)
    checkpoint_blocks_(FAMILY.blocks(transformer))
    _, recomputed = loss_and_gradients(transformer, layers, text)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_products_that_end_a_block_are_not_computed_again(tiny_model, monkeypatch):
    transformer, layers = prepared(tiny_model, "none")
    blocks = FAMILY.blocks(transformer)
    text = [torch.zeros(5, 32)]

    def operations() -> int:
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(transformer, layers, text)
        return counter.get_total_flops()

    spared = []

    def note(layer, inputs) -> None:  # all but one token's
        spared.append(2 * (inputs[0].shape[1] - 1) * layer.in_features * layer.out_features)

    last = ("proj_out", "ff.net.2", "ff_context.net.2")
    closing = [blocks[i].get_submodule(n) for i in places_to_recompute(len(blocks)) for n in last if has(blocks[i], n)]
    hooks = [layer.register_forward_pre_hook(note) for layer in closing]
    loss_and_gradients(transformer, layers, text)
    for hook in hooks:
        hook.remove()
    checkpoint_blocks_(blocks)
    brief = operations()
    monkeypatch.setattr(checkpointing, "unread_layers", lambda *_, **__: ())
    assert len(spared) == len(closing) > 0 and operations() - brief == sum(spared)


def has(block, name) -> bool:
    return name in dict(block.named_modules())


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
    assert count(lambda: loss_and_gradients(transformer, layers, text)) == 2 * num_blocks - 1  # not the last
    with torch.no_grad():
        assert (
            count(lambda: FAMILY.predict(transformer, torch.zeros(1, *NOISY[FAMILY.name]), torch.ones(1), text))
            == num_blocks
        )
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
            channels, height, _ = NOISY[FAMILY.name]
            FAMILY.predict(transformer, torch.zeros(1, channels, 2 * height, 2 * height), torch.ones(1), text)
        return total

    plain = saved_bytes()
    checkpoint_blocks_(FAMILY.blocks(transformer))
    assert saved_bytes() < plain / 2
