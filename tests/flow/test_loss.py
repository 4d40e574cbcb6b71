import math

import pytest
import torch
from chroma_trainer.trainer_core.config.training import LOSS_WEIGHTINGS
from chroma_trainer.trainer_core.flow.loss import LOWEST_SIGMA, error_of, sigma_weight, velocity_loss

from tests.narrowing import present


def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)


def test_is_torchs_mse_of_each_sample():
    prediction, target = pair()
    loss = velocity_loss(prediction, target)
    assert loss.shape == (2,) and loss.dtype == torch.float32
    for i in range(2):
        assert loss[i] == pytest.approx(torch.nn.functional.mse_loss(prediction[i], target[i]).item(), rel=1e-6)


def test_low_precision_enters_but_does_not_stay():
    prediction, target = (t.bfloat16() for t in pair())
    assert velocity_loss(prediction, target).dtype == torch.float32
    torch.testing.assert_close(velocity_loss(prediction, target), velocity_loss(prediction.float(), target.float()))


def test_gradient_is_twice_the_error_over_its_count():
    prediction, target = pair()
    prediction.requires_grad_()
    velocity_loss(prediction, target).sum().backward()
    torch.testing.assert_close(prediction.grad, 2 * (prediction - target).detach() / 48)


def test_equal_weights_change_nothing_however_large():
    prediction, target = pair()
    for weight in (1.0, 0.01, 250.0):
        weights = torch.full((2, 1, 4, 4), weight)
        torch.testing.assert_close(velocity_loss(prediction, target, weights), velocity_loss(prediction, target))


def test_a_mask_counts_only_what_it_shows():
    prediction, target = pair()
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, :2] = 1
    expected = velocity_loss(prediction[:, :, :2], target[:, :, :2])
    torch.testing.assert_close(velocity_loss(prediction, target, mask), expected)


def test_an_empty_mask_is_no_loss_and_no_gradient():
    prediction, target = pair()
    prediction.requires_grad_()
    loss = velocity_loss(prediction, target, torch.zeros(2, 1, 1, 1))
    loss.sum().backward()
    assert loss.tolist() == [0, 0] and present(prediction.grad).abs().max() == 0


def test_huber_is_its_formula_and_its_gradient_autograds():
    difference = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    for c in (0.1, 1.0, 10.0):
        formula = 2 * c * c * ((1 + (difference / c) ** 2).sqrt() - 1)
        torch.testing.assert_close(error_of(difference, "huber", c), formula)
        (gradient,) = torch.autograd.grad(error_of(difference, "huber", c).sum(), difference)
        torch.testing.assert_close(gradient, 2 * difference / (1 + (difference / c) ** 2).sqrt())


def test_the_limits_of_huber_are_mse_and_mae():
    difference = torch.tensor([-2.0, -1e-3, 0.0, 0.5, 30.0])
    torch.testing.assert_close(error_of(difference, "huber", 1e4), error_of(difference, "mse"), rtol=1e-5, atol=0)
    # In fp32 the formula as it is written gives 0 for errors far below c.
    tiny = torch.tensor([1e-4])
    torch.testing.assert_close(error_of(tiny, "huber", 1.0), tiny.square(), rtol=1e-6, atol=0)
    large = torch.tensor([5.0, -50.0])
    torch.testing.assert_close(error_of(large, "huber", 1e-3) / 2e-3, error_of(large, "mae"), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["mae", "huber"])
def test_other_losses_weigh_masks_as_mse_does(kind):
    prediction, target = pair()
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, :2] = 1
    expected = velocity_loss(prediction[:, :, :2], target[:, :, :2], None, kind, 0.5)
    torch.testing.assert_close(velocity_loss(prediction, target, mask, kind, 0.5), expected)
    assert expected.dtype == torch.float32


def test_mae_is_torchs():
    prediction, target = pair()
    loss = velocity_loss(prediction, target, None, "mae").mean().item()
    assert loss == pytest.approx(torch.nn.functional.l1_loss(prediction, target).item(), rel=1e-6)


def test_weights_by_sigma_are_the_papers():
    sigma = torch.linspace(0, 1, 10_001)
    weights = {kind: sigma_weight(kind, sigma) for kind in LOSS_WEIGHTINGS}
    assert torch.equal(weights["none"], torch.ones(10_001)) and torch.equal(weights["sigma"], sigma)
    for kind in ("cosmap", "bell"):  # densities on [0, 1], highest in the middle
        assert torch.trapezoid(weights[kind], sigma).item() == pytest.approx(1, abs=1e-4)
        assert weights[kind].argmax() in (4999, 5000)
    assert weights["bell"][[0, -1]].abs().max() < 1e-6
    assert weights["cosmap"][0].item() == pytest.approx(2 / math.pi)
    assert weights["sigma_sqrt"][5000].item() == pytest.approx(4)
    assert weights["sigma_sqrt"][0].item() == pytest.approx(1 / LOWEST_SIGMA**2)
    assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in weights.values())
