import torch
from chroma_trainer.trainer_core.flow.path import interpolate


def pair(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 2, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def test_ends_are_the_picture_and_the_noise():
    x0, noise = pair()
    assert torch.equal(interpolate(x0, noise, torch.zeros(3))[0], x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(3))[0], noise)


def test_velocity_is_the_slope_of_the_path():
    x0, noise = pair(torch.float64)
    sigma = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    below, velocity = interpolate(x0, noise, sigma - 1e-6)
    above, _ = interpolate(x0, noise, sigma + 1e-6)
    torch.testing.assert_close((above - below) / 2e-6, velocity, rtol=0, atol=1e-8)
    assert torch.equal(velocity, noise - x0)


def test_each_sample_has_its_own_sigma():
    x0, noise = pair()
    sigma = torch.tensor([0.2, 0.4, 0.9])
    together, _ = interpolate(x0, noise, sigma)
    for i in range(3):
        assert torch.equal(together[i], interpolate(x0[i : i + 1], noise[i : i + 1], sigma[i : i + 1])[0][0])


def test_one_step_back_along_the_velocity_is_the_picture():
    x0, noise = pair(torch.float64)
    sigma = torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64)
    x, velocity = interpolate(x0, noise, sigma)
    torch.testing.assert_close(x - sigma.view(3, 1, 1, 1) * velocity, x0, rtol=0, atol=1e-14)
