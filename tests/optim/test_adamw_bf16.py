"""Rounding at random has no bias, and what it stores follows AdamW in fp32."""

from __future__ import annotations

import pytest
import torch
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.optim.adamw_bf16 import PART, round_stochastically
from torch import nn


def uniform(shape, seed=0):
    return torch.randint(0, 1 << 16, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def test_rounding_goes_to_a_neighbour_and_its_mean_is_the_value():
    values = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(-25, 25).float()
    draws = round_stochastically(values.expand(40_000, 50).contiguous(), uniform((40_000, 50))).double()
    below, above = draws.min(0).values, draws.max(0).values
    spacing = above - below
    assert ((draws == below) | (draws == above)).all() and ((below <= values) & (values <= above)).all()
    assert (spacing <= values.abs().double() / 128).all()
    error = (draws.mean(0) - values.double()).abs()
    assert (error <= 5 * 0.5 * spacing / 200).all()  # five deviations of the mean of 40,000 draws


def test_what_bf16_holds_is_not_rounded():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(round_stochastically(values.float(), uniform((1000,))), values)


def test_what_is_not_finite_stays_so():
    values = torch.tensor([float("inf"), float("-inf"), float("nan")])
    got = round_stochastically(values, torch.full((3,), (1 << 16) - 1, dtype=torch.int32))
    assert got[0] == float("inf") and got[1] == float("-inf") and got[2].isnan()


def path(build, steps=300, size=(64, 64)):
    """Weights after `steps` steps of 1e-4 on weights of about 1: each step is a fortieth of what bf16 can hold."""
    generator = torch.Generator().manual_seed(4)
    param = nn.Parameter((torch.rand(size, generator=generator) + 1).bfloat16().float())
    optimizer = build(param)
    for _ in range(steps):
        param.grad = (1 + 0.1 * torch.randn(size, generator=generator)).to(param.dtype)
        optimizer.step()
    return param.detach().float(), optimizer


def bf16(**settings):
    return lambda param: PART.build([param], OptimizerConfig(**settings), 1e-4, 0.0, 7)


def test_small_steps_are_not_lost():
    exact, _ = path(lambda param: torch.optim.AdamW([param], lr=1e-4, weight_decay=0.0))
    ours, optimizer = path(bf16())
    careful, _ = path(bf16(kahan=True))
    assert ours.isfinite().all() and {
        t.dtype for t in optimizer.state_dict()["state"][0].values() if torch.is_tensor(t)
    } == {torch.bfloat16}
    assert (ours - exact).mean().abs() < 5e-4  # the way is 0.03; 4096 weights, a spacing of 0.0078
    assert (careful - exact).abs().max() <= 0.5 * 0.0079 + 6e-4  # half a spacing of bf16, each of them
    assert (ours - exact).abs().mean() > (careful - exact).abs().mean()


def test_with_kahan_weight_and_rest_together_are_nearly_fp32():
    exact, _ = path(lambda param: torch.optim.AdamW([param], lr=1e-4, weight_decay=0.0))
    param, optimizer = path(bf16(kahan=True))
    (state,) = optimizer.state.values()
    assert (param + state["c"].float() - exact).abs().max() < 1e-3  # an eighth of the spacing of bf16


@pytest.mark.parametrize("kahan", [False, True])
def test_a_weight_in_fp32_is_not_rounded(kahan):
    """Beside weights in bf16: row norms of a DoRA, which hold parts of the base."""
    exact, ours = (nn.Parameter(torch.linspace(0.5, 1.5, 65)) for _ in range(2))
    beside = nn.Parameter(torch.ones(5, 5))
    optimizer = PART.build([beside, ours], OptimizerConfig(kahan=kahan), 1e-3, 0.01, 0)
    ours.data = exact.detach().clone()  # build has rounded it
    reference = torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.01)
    for step in range(20):
        beside.grad = torch.ones_like(beside)
        exact.grad = torch.randn(65, generator=torch.Generator().manual_seed(step))
        ours.grad = exact.grad.clone()
        optimizer.step()
        reference.step()
    assert beside.dtype == torch.bfloat16 and ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kahan", [False, True])
def test_its_second_moment_can_shrink(kahan):
    """Rounded to the nearest bf16, 0.999 v is v again, for ever."""
    param = nn.Parameter(torch.zeros(64, 64))
    optimizer = bf16(kahan=kahan)(param)
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = optimizer.state[param]["v"].float().mean().item()
    for _ in range(700):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert optimizer.state[param]["v"].float().mean().item() == pytest.approx(before * 0.999**700, rel=0.03)


def test_noise_is_of_the_parameters_place_and_the_step():
    """A parameter without a gradient does not shift the draws of the others."""

    def last(first_has_gradient):
        params = [nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(16, 16))]
        optimizer = PART.build(params, OptimizerConfig(), 1e-3, 0.0, 7)
        for _ in range(3):
            params[0].grad = torch.ones_like(params[0]) if first_has_gradient else None
            params[1].grad = torch.ones_like(params[1])
            optimizer.step()
        return params[1].detach()

    assert torch.equal(last(True), last(False)) and last(True).unique().numel() > 1
