"""An optimiser of ours: its whole state lies in `state`, by parameter, and travels to the bit."""

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
    """each.mul_(xs, 2) is torch._foreach_mul_(xs, 2): one call, on a GPU a few kernels, for a whole list of tensors."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, f"_foreach_{name}")


each: Any = _Each()


class Unguarded(OptimizerAbilities, Optimizer):
    """Goes before torch's class among the bases."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class AdamW(Unguarded, torch.optim.AdamW):
    """torch's, to the bit. Not differentiable itself, so that its step is taken without gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return _ADAMW_STEP(self, closure)


class ExactOptimizer(Unguarded):
    """Moves parameters in lots, one fused call for each line of its formula.

    A subclass says how the state of a parameter begins and how a lot moves. A parameter without a gradient is left
    alone, and does not count the step.
    """

    def initial(self, param: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a parameter before its first step: tensors, ints and floats."""
        raise NotImplementedError

    def move_(self, params: Lot, grads: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any]) -> None:
        """One step of parameters whose plain state is the same. Gradients are not to be changed."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None, "closures are not used here"
        for group, params in self.lots():
            self.move_(params, gradients(params), [self.state[param] for param in params], group)

    def lots(self) -> Iterator[tuple[dict[str, Any], Lot]]:
        """(group, parameters with a gradient that lie on one device, have one dtype and the same plain state)."""
        for group in self.param_groups:
            found: dict[tuple, Lot] = {}
            for param in group["params"]:
                if param.grad is None:
                    continue
                if not self.state[param]:
                    self.state[param].update(self.initial(param, group))
                plain = tuple(value for value in self.state[param].values() if not isinstance(value, Tensor))
                found.setdefault((param.device, param.dtype, plain), []).append(param)
            yield from ((group, params) for params in found.values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but a tensor keeps its own dtype: torch gives it that of the parameter."""
        super().load_state_dict(state_dict)
        owned = [(param, group) for group in self.param_groups for param in group["params"]]
        for index, values in state_dict["state"].items():
            param, group = owned[index]
            exact = {
                name: value.detach().to(param.device, copy=True) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }
            self.state[param] = {**self.initial(param, group), **exact}  # a setting may want more than was saved


def gradients(params: Lot) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]


def of(states: list[dict[str, Any]], name: str) -> list[Tensor]:
    """The tensors of this name."""
    return [state[name] for state in states]


def count_(states: list[dict[str, Any]]) -> int:
    """Count the step. Returns its number, from 1 on."""
    for state in states:
        state["step"] += 1
    return states[0]["step"]
