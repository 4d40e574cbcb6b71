"""Base classes of our optimizers. Their whole state is in `state`, per parameter, and is saved and loaded exactly."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .optimizer import OptimizerAbilities

_ADAMW_STEP = inspect.unwrap(torch.optim.AdamW.step)

Lot = list[nn.Parameter]


class _Each:
    """each.mul_(xs, 2) is torch._foreach_mul_(xs, 2): one call for a list of tensors; on a GPU, a few kernels."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, f"_foreach_{name}")


each: Any = _Each()


class Unguarded(OptimizerAbilities, Optimizer):
    """Optimizer methods without torch's wrappers. Must come before torch's class in the bases."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class AdamW(Unguarded, torch.optim.AdamW):
    """torch's AdamW, bit for bit. Not differentiable itself, so its step runs without gradients."""

    stored_name = "AdamW"

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return _ADAMW_STEP(self, closure)


class ExactOptimizer(Unguarded):
    """Updates parameters in lists ("lots"), with one foreach call per line of the formula.

    A subclass defines the initial state of a parameter and the update of a lot. A parameter without a gradient is not
    changed, and its step is not counted.
    """

    def initial(self, param: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter before its first step: tensors, ints and floats."""
        raise NotImplementedError

    def move_(self, params: Lot, grads: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any]) -> None:
        """Do one step for parameters whose non-tensor state is equal. Must not change the gradients."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "closures are not used here"
        for group, params in self.lots():
            self.move_(params, gradients(params), [self.state[param] for param in params], group)

    def lots(self) -> Iterator[tuple[dict[str, Any], Lot]]:
        """Yield (group, parameters with a gradient on one device, with one dtype and equal non-tensor state)."""
        for group in self.param_groups:
            lots: dict[tuple, Lot] = {}
            for param in group["params"]:
                if param.grad is None:
                    continue
                if not self.state[param]:
                    self.state[param].update(self.initial(param, group))
                plain = tuple(value for value in self.state[param].values() if not isinstance(value, Tensor))
                lots.setdefault((param.device, param.dtype, plain), []).append(param)
            yield from ((group, params) for params in lots.values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state like torch does, but keep each tensor's dtype. torch converts it to the parameter's dtype."""
        super().load_state_dict(state_dict)
        owned = [(param, group) for group in self.param_groups for param in group["params"]]
        for index, values in state_dict["state"].items():
            param, group = owned[index]
            exact = {
                name: value.detach().to(param.device, copy=True) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }
            self.state[param] = {**self.initial(param, group), **exact}  # settings may need more than was saved


def gradients(params: Lot) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]


def of(states: list[dict[str, Any]], name: str) -> list[Tensor]:
    """Return each state's tensor of this name."""
    return [state[name] for state in states]


def count_(states: list[dict[str, Any]]) -> int:
    """Increment the step count of each state. Return it, counted from 1."""
    for state in states:
        state["step"] += 1
    return states[0]["step"]
