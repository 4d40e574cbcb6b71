"""Rollouts on closed forms: a picture's own velocity leads along the straight path, an error is what the target corrects."""

from __future__ import annotations

import pytest
import torch
from chroma_trainer.trainer_core.flow.loss import velocity_loss
from chroma_trainer.trainer_core.flow.path import interpolate
from chroma_trainer.trainer_core.flow.rollout import STRIDE, descend, rollout_levels, way_back

SIGMA = torch.tensor([0.0, 1e-4, 0.3, 0.97, 1.0], dtype=torch.float64)


def drawn(count: int = len(SIGMA)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, count, 4, 3, 2, generator=generator, dtype=torch.float64)
    return x0, noise


@pytest.mark.parametrize("num_steps", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_fall_evenly_to_sigma_and_begin_at_most_at_1(num_steps, dtype):
    sigma = torch.cat([SIGMA.to(dtype), torch.rand(1000, generator=torch.Generator().manual_seed(1)).to(dtype)])
    levels = rollout_levels(sigma, num_steps)
    assert levels.shape == (num_steps + 1, len(sigma)) and torch.equal(levels[-1], sigma)
    assert levels.max() == 1 and (levels.diff(dim=0) <= 0).all()
    torch.testing.assert_close(levels[0], (sigma + num_steps * STRIDE).clamp(max=1))
    steps = levels.diff(dim=0)
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=0, atol=3e-7)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_exact_velocity_of_one_picture_leads_along_the_straight_path(num_steps):
    """v(x, sigma) = (x - x0) / sigma for every x: then a rollout changes nothing, neither input nor target."""
    x0, noise = drawn()
    levels = rollout_levels(SIGMA, num_steps)
    x, _ = interpolate(x0, noise, levels[0])
    x_hat = descend(lambda x, sigma: (x - x0) / sigma.view(-1, 1, 1, 1), x, levels)
    straight, velocity = interpolate(x0, noise, SIGMA)
    torch.testing.assert_close(x_hat[1:], straight[1:], rtol=0, atol=1e-13)
    target, share = way_back(x_hat, x0, levels)
    torch.testing.assert_close(target[1:], (share * velocity)[1:], rtol=1e-9, atol=1e-10)


def test_the_target_leads_from_where_the_steps_erred_to_the_picture():
    x0, noise = drawn()
    levels = rollout_levels(SIGMA, 3)
    x, velocity = interpolate(x0, noise, levels[0])
    x_hat = descend(lambda x, sigma: velocity + 0.5 * x.sin(), x, levels)
    target, share = way_back(x_hat, x0, levels)
    sigma = SIGMA.view(-1, 1, 1, 1)
    wanted = (target / share)[1:]  # the velocity at which the loss is 0
    torch.testing.assert_close((x_hat - sigma * target / share)[1:], x0[1:], rtol=0, atol=1e-12)
    assert (wanted - velocity[1:]).abs().amax((1, 2, 3))[
        :-1
    ].min() > 1e-3  # not the straight path's: the error is made good


def test_an_error_counts_no_more_at_a_small_sigma():
    """The loss of a model that is off by e everywhere is at most |e|^2, and finite where sigma is 0."""
    x0, noise = drawn()
    levels = rollout_levels(SIGMA, 3)
    x, velocity = interpolate(x0, noise, levels[0])
    error = torch.full_like(x, 0.7)
    x_hat = descend(lambda x, sigma: velocity + error, x, levels)
    target, share = way_back(x_hat, x0, levels)
    loss = velocity_loss(share * (velocity + error), target)
    # x_hat is off by -(s' - sigma) e and the last step adds -sigma e: s' e in all, in units of s'.
    torch.testing.assert_close(loss, torch.full_like(loss, 0.49))


def test_at_the_same_level_it_is_the_velocity_loss():
    x0, noise = drawn()
    x, velocity = interpolate(x0, noise, SIGMA)
    levels = SIGMA.expand(4, -1)
    x_hat = descend(lambda x, sigma: torch.ones_like(x), x, levels)
    assert torch.equal(x_hat, x)
    target, share = way_back(x_hat, x0, levels)
    assert torch.equal(share, torch.ones_like(share)) and target.isfinite().all()
    torch.testing.assert_close(target[1:], velocity[1:], rtol=0, atol=1e-11)


def test_euler_steps_are_of_first_order():
    """x' = x: from level 1 down to 0.9, e^-0.1 in the limit; half the step, half the error."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    exact = torch.tensor(-0.1, dtype=torch.float64).exp()
    errors = []
    for num_steps in (8, 16):
        levels = torch.linspace(1, 0.9, num_steps + 1, dtype=torch.float64)[:, None]
        errors.append((descend(lambda x, sigma: x, x, levels) - exact).abs().item())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
