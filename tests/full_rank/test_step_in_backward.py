"""Steps inside of the backward pass: the same bytes as steps after it, bf16 weights that lose nothing, exact resumes."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from chroma_trainer.trainer_core.config.optimizer import TOGETHER, OptimizerConfig
from chroma_trainer.trainer_core.full_rank.step_in_backward import StepInBackward
from chroma_trainer.trainer_core.registry import load, names
from torch import nn

SEPARATE = [name for name in names("optimizer") if name not in TOGETHER]
RUNNABLE = [name for name in SEPARATE if not load("optimizer", name).missing("cpu")]


def make_net(dtype: torch.dtype) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 3))
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) / 4)
    return net.to(dtype)


def stepper_of(net: nn.Module, name: str, rate: float = 0.01) -> StepInBackward:
    part = load("optimizer", name)
    config = OptimizerConfig(optimizer=name)
    optimizer = part.build(list(net.parameters()), config, rate, 0.01, 5)
    return StepInBackward(optimizer, dict(net.named_parameters()), seed=5)


def loss_of(net: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(step)).to(next(net.parameters()).dtype)
    return net(x).float().square().mean()


def train_inside(net: nn.Module, name: str, steps: int = 4) -> StepInBackward:
    stepper = stepper_of(net, name)
    for step in range(steps):
        with stepper.active(step):
            loss_of(net, step).backward()
        assert all(parameter.grad is None for parameter in net.parameters()), "a gradient outlived its step"
    return stepper


def bytes_of(net: nn.Module) -> list[bytes]:
    return [p.detach().view(torch.uint8).numpy().tobytes() for p in net.parameters()]


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name != "adamw_bf16"])
def test_fp32_weights_are_those_of_the_optimizers_own_step(name):
    inside, after = make_net(torch.float32), make_net(torch.float32)
    train_inside(inside, name)
    optimizer = load("optimizer", name).build(list(after.parameters()), OptimizerConfig(optimizer=name), 0.01, 0.01, 5)
    for step in range(4):
        loss_of(after, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bytes_of(inside) == bytes_of(after) != bytes_of(make_net(torch.float32))


@pytest.mark.parametrize("name", RUNNABLE)
def test_bf16_weights_are_those_of_steps_after_the_backward_pass(name):
    inside, after = make_net(torch.bfloat16), make_net(torch.bfloat16)
    train_inside(inside, name)
    stepper = stepper_of(after, name)
    for step in range(4):
        loss_of(after, step).backward()  # no step is active, so all gradients stay
        for parameter in after.parameters():  # and in another order than the backward pass has
            stepper.step_(parameter, step)
    assert bytes_of(inside) == bytes_of(after) != bytes_of(make_net(torch.bfloat16))
    assert {parameter.dtype for parameter in inside.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_loaded_state_continues_with_the_same_bytes(name):
    whole, parts = make_net(torch.bfloat16), make_net(torch.bfloat16)
    train_inside(whole, name)
    first = train_inside(parts, name, steps=2)
    saved = copy.deepcopy(first.optimizer.state_dict()["state"])
    second_net = make_net(torch.bfloat16)
    second_net.load_state_dict(parts.state_dict())
    second = stepper_of(second_net, name)
    second.optimizer.load_state_dict({"state": saved, "param_groups": second.optimizer.state_dict()["param_groups"]})
    for step in (2, 3):
        with second.active(step):
            loss_of(second_net, step).backward()
    assert bytes_of(second_net) == bytes_of(whole)


def test_states_of_the_weights_shape_are_stored_in_bf16():
    def sizes(name: str) -> int:
        net = make_net(torch.bfloat16)
        states = train_inside(net, name).optimizer.state.values()
        tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.ndim)

    count = sum(parameter.numel() for parameter in make_net(torch.float32).parameters())
    assert sizes("adamw") == sizes("adamw_bf16") == 4 * count and sizes("optimi-lion") == 2 * count
    assert sizes("adafactor") < count  # rows and columns


@pytest.mark.parametrize("name", ["adamw", "adafactor", "optimi-lion"])
def test_steps_below_the_precision_of_bf16_add_up(name):
    """200 steps of 1e-5 move weights of 1 by 0.002 on average. Rounded to the nearest bf16, none would move."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = load("optimizer", name).build([weight], OptimizerConfig(optimizer=name), 1e-5, 0.0, 5)
    stepper = StepInBackward(optimizer, {"weight": weight}, seed=5)
    for step in range(200):
        with stepper.active(step):
            weight.sum().backward()
    assert 1 - weight.detach().float().mean() == pytest.approx(0.002, rel=0.1)


def test_the_noise_depends_on_seed_step_and_name_alone():
    def rounded(seed: int, step: int, name: str, others: int = 0) -> torch.Tensor:
        weights = [nn.Parameter(torch.full((32, 32), 0.7, dtype=torch.bfloat16)) for _ in range(1 + others)]
        optimizer = load("optimizer", "adafactor").build(weights, OptimizerConfig(optimizer="adafactor"), 1e-4, 0.0, 0)
        named = {name: weights[-1], **{f"other {i}": weight for i, weight in enumerate(weights[:-1])}}
        stepper = StepInBackward(optimizer, named, seed)
        with stepper.active(step):
            torch.stack([weight.sum() for weight in weights]).sum().backward()
        return weights[-1].detach()

    assert torch.equal(rounded(1, 2, "a"), rounded(1, 2, "a", others=3))
    for other in ((2, 2, "a"), (1, 3, "a"), (1, 2, "b")):
        assert not torch.equal(rounded(1, 2, "a"), rounded(*other))


def test_the_norm_is_that_of_all_gradients_before_scaling():
    inside, after = make_net(torch.float32), make_net(torch.float32)
    stepper = stepper_of(inside, "adamw")
    with stepper.active(0, scale=0.5):
        loss_of(inside, 0).backward()
    loss_of(after, 0).backward()
    expected = nn.utils.get_total_norm([p.grad for p in after.parameters() if p.grad is not None])
    assert float(stepper.norm()) == pytest.approx(float(expected), rel=1e-6)


def test_a_scaled_gradient_moves_as_one_that_was_clipped():
    inside, after = make_net(torch.float32), make_net(torch.float32)
    stepper, other = stepper_of(inside, "adamw"), stepper_of(after, "adamw")
    with stepper.active(0, scale=0.25):
        loss_of(inside, 0).backward()
    loss_of(after, 0).backward()
    for parameter in after.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(0.25)
        other.step_(parameter, 0)
    assert bytes_of(inside) == bytes_of(after)


def test_nothing_holds_the_weights_after_the_run():
    """Hooks that led from a weight back to it held 18 GB of a GPU's memory until the process ended."""
    net = make_net(torch.float32)
    train_inside(net, "adamw", steps=2)
    memory = [weakref.ref(parameter) for parameter in net.parameters()]
    del net
    gc.collect()
    assert not [reference for reference in memory if reference() is not None]
