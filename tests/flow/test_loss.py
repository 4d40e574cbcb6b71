import pytest
import torch
from chroma_trainer.trainer_core.flow.loss import velocity_loss


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
    assert loss.tolist() == [0, 0] and prediction.grad.abs().max() == 0
