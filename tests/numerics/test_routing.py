"""Token routing against plain slow code: what skips blocks is what it was, and gradients are those of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import inject_, trainable_parameters
from chroma_trainer.trainer_core.adapters.lora import LoraLinear
from chroma_trainer.trainer_core.adapters.targets import resolve_targets
from chroma_trainer.trainer_core.memory.activation_checkpointing import checkpoint_blocks_
from chroma_trainer.trainer_core.memory.group_offload import swap_blocks_
from chroma_trainer.trainer_core.models.attention_backends import compile_blocks_
from chroma_trainer.trainer_core.models.token_routing import Route
from chroma_trainer.trainer_core.registry import load, names
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

FAMILY: Any = None  # of the test that runs
NOISY = {"chroma": (16, 8, 6), "flux": (16, 8, 6), "radiance": (3, 64, 48)}  # latents or pixels of 12 tokens
TOKENS, WINDOWS = 12, [(0, 1), (0, 0), (1, 2), (2, 2), (2, 3), (0, 3)]  # of 2 double and 2 single blocks


@pytest.fixture(params=names("family"))
def some_model(request, monkeypatch):
    """Of each family."""
    monkeypatch.setitem(globals(), "FAMILY", load("family", request.param)())
    return request.getfixturevalue(f"tiny_{request.param}_model")


def prepared(some_model, level="none"):
    transformer = FAMILY.load_transformer(some_model)
    load("quantization", level)().quantize_(transformer, FAMILY.full_precision)
    layers = inject_(
        transformer, resolve_targets(transformer, FAMILY, "all+ffs"), 4, 4, generator=torch.Generator().manual_seed(1)
    )
    for layer in layers.values():
        nn.init.normal_(layer.get_parameter("lora_B"), std=0.05)
    return transformer, [parameter for _, parameter in trainable_parameters(layers)]


def inputs(lengths=(3, 9)) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Two pictures of 12 tokens, and text of different lengths."""
    draw = torch.Generator().manual_seed(3)
    text = [torch.randn(length, 32, generator=draw) for length in lengths]
    return torch.randn(len(text), *NOISY[FAMILY.name], generator=draw), torch.linspace(0.2, 0.8, len(text)), text


def route(first: int, last: int, count: int = 5, batch: int = 2) -> Route:
    kept = torch.rand(batch, TOKENS, generator=torch.Generator().manual_seed(4)).argsort(1)[:, :count].sort(1).values
    return Route(first, last, kept)


def gradients(parameters, velocity: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(velocity.square().mean(), parameters))


class Plainly(nn.Module):
    """A block that only some rows go through: sample by sample, token by token, and the others are put back as they were."""

    def __init__(self, block: nn.Module, kept: Tensor):
        super().__init__()
        self.block, self.kept = block, kept

    def forward(self, tokens: Tensor, *others: Any) -> Any:
        *front, positions, mask = others
        num_text = len(positions[0]) - TOKENS
        is_double = isinstance(front[0], Tensor) and front[0].ndim == 3  # the text's own stream
        samples = []
        for i, kept in enumerate(self.kept.tolist()):
            chosen = [*range(num_text), *(num_text + place for place in kept)]
            lead = 0 if is_double else num_text
            own = [x[i : i + 1] for x in front]
            seen = [*range(lead), *(lead + place for place in kept)]
            here = tuple(table[chosen] for table in positions)
            out = self.block(tokens[i : i + 1, seen], *own, here, None if mask is None else mask[i : i + 1, chosen])
            text, through = out if is_double else (None, out)
            rows = list(tokens[i].unbind(0))
            for place, row in zip(seen, through[0].unbind(0), strict=True):
                rows[place] = row
            samples.append((text, torch.stack(rows)))
        whole = torch.stack([rows for _, rows in samples])
        return (torch.cat([text for text, _ in samples]), whole) if is_double else whole


def plainly_(transformer: Any, way: Route) -> None:
    num_double = len(transformer.transformer_blocks)
    for place in range(way.first, way.last + 1):
        in_double = place < num_double
        blocks = transformer.transformer_blocks if in_double else transformer.single_transformer_blocks
        at = place if in_double else place - num_double
        blocks[at] = Plainly(blocks[at], way.kept)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("lengths", [(3, 9), pytest.param((5, 5), marks=pytest.mark.slow)], ids=["masked", "equal"])
def test_outputs_and_gradients_are_those_of_plain_code(some_model, window, lengths):
    transformer, parameters = prepared(some_model)
    way, given = route(*window), inputs(lengths)
    ours = FAMILY.predict(transformer, *given, route=way)
    found = gradients(parameters, ours)
    whole = FAMILY.predict(transformer, *given)
    plainly_(transformer, way)
    theirs = FAMILY.predict(transformer, *given)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert (ours - whole).abs().max() > 1e-2
    for a, b in zip(found, gradients(parameters, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_route_that_keeps_all_changes_no_bit(some_model, window):
    transformer, parameters = prepared(some_model)
    first, last = window
    everything = Route(first, last, torch.arange(TOKENS).expand(2, -1))
    plain, routed = (FAMILY.predict(transformer, *inputs(), route=way) for way in (None, everything))
    assert torch.equal(plain, routed)
    both = (gradients(parameters, velocity) for velocity in (plain, routed))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_through_the_last_block_a_skipped_token_is_what_it_was(some_model):
    """All blocks skipped, so that only the ends of the model are left."""
    transformer, _ = prepared(some_model)
    way, (x, sigma, text) = route(0, 3), inputs()
    other = x.clone()
    tokens = torch.ones(2, TOKENS, dtype=torch.bool).scatter(1, way.kept, False).view(2, 1, 4, 3)
    patch = x.shape[3] // 3
    skipped = tokens.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    other += skipped * 1.0
    with torch.no_grad():
        before, after = (FAMILY.predict(transformer, latents, sigma, text, route=way) for latents in (x, other))
    assert torch.equal(before[~skipped.expand_as(before)], after[~skipped.expand_as(before)])
    assert not torch.isclose(before[skipped.expand_as(before)], after[skipped.expand_as(before)]).any()


@pytest.mark.parametrize("level", [pytest.param("none", marks=pytest.mark.slow), "int8-quanto"])
@pytest.mark.parametrize("change", ["checkpointed", "swapped"])
def test_where_activations_or_weights_are_not_kept_it_is_the_same(some_model, level, change):
    transformer, parameters = prepared(some_model, level)
    velocity = FAMILY.predict(transformer, *inputs(), route=route(1, 2))
    wanted = gradients(parameters, velocity)
    if change == "swapped":
        swap = swap_blocks_(FAMILY.blocks(transformer), torch.device("cpu"))
        swap.take_out()
        swap.send_home()
    checkpoint_blocks_(FAMILY.blocks(transformer), spare_last=change == "checkpointed")
    again = FAMILY.predict(transformer, *inputs(), route=route(1, 2))
    assert torch.equal(velocity, again)
    assert all(torch.equal(a, b) for a, b in zip(wanted, gradients(parameters, again), strict=True))


@pytest.mark.slow
def test_compiled_blocks_take_routed_tokens(tiny_chroma_model, monkeypatch):
    monkeypatch.setitem(globals(), "FAMILY", load("family", "chroma")())
    transformer, parameters = prepared(tiny_chroma_model)
    velocity = FAMILY.predict(transformer, *inputs(), route=route(1, 2))
    wanted = gradients(parameters, velocity)
    compile_blocks_(FAMILY.blocks(transformer)[1:3], backend="eager")  # those that are routed: tracing takes long
    again = FAMILY.predict(transformer, *inputs(), route=route(1, 2))
    torch.testing.assert_close(again, velocity, rtol=1e-4, atol=1e-5)
    for a, b in zip(wanted, gradients(parameters, again), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_a_routed_block_does_the_work_of_the_tokens_it_gets(some_model):
    transformer, _ = prepared(some_model)
    x, sigma, text = inputs((5,))

    def operations(way: Route | None) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            FAMILY.predict(transformer, x, sigma, text, route=way)
        return counter.get_total_flops()

    whole, of_one = operations(None), route(1, 1, 4, 1)
    block = FAMILY.blocks(transformer)[1]
    counted = []

    def note(module, args, out) -> None:
        counted.append((args[0].shape[1], args[1].shape[1]))

    block.register_forward_hook(note)
    routed = operations(of_one)
    ((seen, num_text),) = counted
    assert seen == 4
    layers = {name: m for name, m in block.named_modules() if isinstance(m, LoraLinear)}
    of_picture = [
        m
        for name, m in layers.items()
        if name in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
    ]
    weights = sum(m.base.weight.numel() + m.lora_A.numel() + m.lora_B.numel() for m in of_picture)
    width = transformer.inner_dim
    attention = 4 * width * ((TOKENS + num_text) ** 2 - (4 + num_text) ** 2)
    assert whole - routed == 2 * (TOKENS - 4) * weights + attention
