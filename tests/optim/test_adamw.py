import pytest
import torch
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.optim import adamw


def build(params, learning_rate, weight_decay, **changes):
    return adamw.build(params, OptimizerConfig(**changes), learning_rate, weight_decay)


def trained(threads, dtype=torch.float32, steps=4, **changes):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (70_003, 7, 32_771)]
        optimizer = build(params, 1e-3, 0.01, **changes)
        for _ in range(steps):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(dtype)
            optimizer.step()
        return [param.detach() for param in params]
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit():
    once, again = trained(1), trained(3)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_is_adamw_as_written():
    """w -= lr decay w,   m = 0.9 m + 0.1 g,   v = 0.999 v + 0.001 g^2,   w -= lr m^ / (sqrt(v^) + eps)"""
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer, w = build([param], 0.1, 0.05), param.detach().clone()
    m = v = torch.zeros(2, dtype=torch.float64)
    for t, gradient in enumerate([[0.3, -1.0], [0.2, 2.0], [-4.0, 0.0]], start=1):
        g = torch.tensor(gradient, dtype=torch.float64)
        param.grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w * (1 - 0.1 * 0.05) - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(param.detach(), w, rtol=1e-12, atol=0)


def test_the_loop_sets_the_rate_of_each_step():
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = build([param], 1e-3, 0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    param.grad = torch.ones(1)
    optimizer.step()
    assert param.item() == 1.0


def test_state_travels_exactly():
    def make():
        return torch.nn.Parameter(torch.ones(5))

    whole, first, second = make(), make(), make()
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(5, generator=generator) for _ in range(6)]
    straight, before = build([whole], 1e-2, 0.01), build([first], 1e-2, 0.01)
    for optimizer, param, part in ((straight, whole, gradients), (before, first, gradients[:3])):
        for gradient in part:
            param.grad = gradient
            optimizer.step()
    second.data.copy_(first.data)
    after = build([second], 1e-2, 0.01)
    after.load_state_dict(before.state_dict())
    for gradient in gradients[3:]:
        second.grad = gradient
        after.step()
    assert torch.equal(whole, second)


def test_nothing_to_train_is_our_fault():
    with pytest.raises(AssertionError):
        build([], 1e-3, 0.0)
