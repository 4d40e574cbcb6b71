"""Norm and rotation as one operation: torch's own numbers, with a gradient of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from chroma_trainer.trainer_core.models import norm_rotate as norm_rotate_module
from chroma_trainer.trainer_core.models.mmdit_layers import RotaryPositions
from chroma_trainer.trainer_core.models.norm_rotate import norm_rotate, turn_heads, turn_streams
from torch import nn

TOKENS, HEADS, WIDTH, EPS = 7, 3, 16, 1e-6


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positions() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(9, (TOKENS, 3), generator=torch.Generator().manual_seed(1))
    return RotaryPositions((4, 6, 6))(ids.float())


def apart(x: torch.Tensor, weight: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The two operations by torch, one after the other: (a, b) -> (a cos - b sin, b cos + a sin)."""
    normed = torch.stack([F.rms_norm(part, (WIDTH,), w, EPS) for part, w in zip(x, weight, strict=True)])
    cosines, sines = (part[..., None, ::2].to(x.dtype) for part in angles)
    a, b = normed[..., ::2], normed[..., 1::2]
    return torch.stack([a * cosines - b * sines, b * cosines + a * sines], dim=-1).flatten(-2)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("has_complex", [True, False])
def test_outputs_and_gradients_are_those_of_the_two_apart(monkeypatch, has_complex, batched):
    if not has_complex:
        monkeypatch.setattr(norm_rotate_module, "COMPLEX_DEVICES", frozenset())
    x, weight, angles = draw(2, 2, TOKENS, HEADS, WIDTH).requires_grad_(), draw(2, WIDTH, seed=2), positions()
    if batched:  # as routed tokens have them: each sample its own
        cosines, sines = (torch.stack([part, part.flip(0)]) for part in angles)
        angles = cosines, sines
    gradient = draw(*x.shape, seed=3)
    ours, theirs = norm_rotate(x, weight, angles, EPS), apart(x, weight, angles)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (of_ours,) = torch.autograd.grad(ours, x, gradient)
    (of_theirs,) = torch.autograd.grad(theirs, x, gradient)
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-10, atol=1e-12)


def test_its_gradient_is_the_derivative():
    weight, angles = draw(2, WIDTH, seed=2), positions()
    x = draw(2, 1, TOKENS, 1, WIDTH).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: norm_rotate(x, weight, angles, EPS), x)


def test_bf16_is_rounded_once():
    """Nearer to fp64 than the two apart, which round between them."""
    weight, angles = draw(2, WIDTH, seed=2).bfloat16(), positions()
    x = draw(2, 1, TOKENS, HEADS, WIDTH).bfloat16()
    exact = apart(x.double(), weight.double(), angles)
    ours, theirs = norm_rotate(x, weight, angles, EPS), apart(x, weight, angles)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).norm() < 0.8 * (theirs.double() - exact).norm()


def test_a_weight_that_is_trained_gets_its_gradient():
    x, angles = draw(2, 1, TOKENS, HEADS, WIDTH), positions()
    weight = draw(2, WIDTH, seed=2).requires_grad_()
    (ours,) = torch.autograd.grad(norm_rotate(x, weight, angles, EPS).square().sum(), weight)
    (theirs,) = torch.autograd.grad(apart(x, weight, angles).square().sum(), weight)
    torch.testing.assert_close(ours, theirs)


def test_both_ways_are_the_same(monkeypatch):
    """As on CUDA, by torch's own norm, and elsewhere."""
    query, key, angles = (
        draw(1, TOKENS, HEADS, WIDTH).float(),
        draw(1, TOKENS, HEADS, WIDTH, seed=4).float(),
        positions(),
    )
    of_query, of_key = (nn.RMSNorm(WIDTH, eps=EPS).requires_grad_(False) for _ in range(2))
    ours = turn_heads(query, key, of_query, of_key, angles)
    monkeypatch.setattr(norm_rotate_module, "FUSED_NORMS", frozenset({"cpu"}))
    theirs = turn_heads(query, key, of_query, of_key, angles)
    assert all(one.is_contiguous() and torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_streams_both_ways(monkeypatch):
    angles = positions()
    norms = [nn.RMSNorm(WIDTH, eps=EPS).requires_grad_(False) for _ in range(4)]
    for i, norm in enumerate(norms):
        norm.weight.copy_(draw(WIDTH, seed=10 + i))
    text = (draw(1, 3, HEADS, WIDTH).float(), draw(1, 3, HEADS, WIDTH, seed=4).float(), norms[0], norms[1])
    image = (draw(1, 4, HEADS, WIDTH, seed=5).float(), draw(1, 4, HEADS, WIDTH, seed=6).float(), norms[2], norms[3])
    ours = turn_streams(text, image, angles)
    monkeypatch.setattr(norm_rotate_module, "FUSED_NORMS", frozenset({"cpu"}))
    theirs = turn_streams(text, image, angles)
    assert all(one.is_contiguous() and torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
