"""Schedule-free AdamW: averages the weights instead of decaying the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config.optimizer import OptimizerConfig
from .foreach import ExactOptimizer, Lot, count_, each, of
from .optimizer import OptimizerPart, Params, as_list


class ScheduleFreeAdamW(ExactOptimizer):
    """Three points: z takes the steps, x is their average, and gradients are computed at y between them.

    y = (1 - b1) z + b1 x
    v = b2 v + (1 - b2) g(y)^2,   rate = lr sqrt(1 - b2^t)
    z' = z - rate u,   u = g / (sqrt(v) + eps) + decay y
    x' = (1 - c) x + c z',   c = rate^2 / sum of rate^2 so far

    The parameters hold y; the state holds z and v. x is (y - (1 - b1) z) / b1, so y moves by
    y' = (1 - c) y + c z - rate (1 - b1 (1 - c)) u.
    `use_averages` replaces y by x for validation and export.

    Source: Defazio et al. 2024, arXiv:2405.15682, algorithm 1.
    """

    stored_name = "ScheduleFreeAdamW"

    def __init__(self, params: list[Any], defaults: dict[str, Any]):
        super().__init__(params, defaults)
        self._is_averaged = False

    def initial(self, param: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"step": 0, "weight_sum": 0.0, "z": param.detach().clone(), "v": torch.zeros_like(param)}

    def move_(self, params: Lot, grads: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any]) -> None:
        assert not self._is_averaged, "can't train while the parameters hold the averaged weights"
        z, v, (beta1, beta2) = of(states, "z"), of(states, "v"), group["betas"]
        rate = group["lr"] * math.sqrt(1 - beta2 ** count_(states))
        weight_sum = states[0]["weight_sum"] + rate**2
        for state in states:
            state["weight_sum"] = weight_sum
        c = rate**2 / weight_sum if weight_sum else 0.0
        each.mul_(v, beta2)
        each.addcmul_(v, grads, grads, 1 - beta2)
        size = each.sqrt(v)
        each.add_(size, group["eps"])
        update = each.div(grads, size)
        each.add_(update, params, alpha=group["weight_decay"])
        each.mul_(params, 1 - c)
        each.add_(params, z, alpha=c)
        each.add_(params, update, alpha=-rate * (1 - beta1 * (1 - c)))
        each.add_(z, update, alpha=-rate)

    @contextmanager
    def use_averages(self) -> Iterator[None]:
        """Context manager in which the parameters hold x. Afterwards they hold y again, bit for bit."""
        if self._is_averaged:
            yield
            return
        originals = [
            (param, param.detach().clone(), self.state[param]["z"], group["betas"][0])
            for group in self.param_groups
            for param in group["params"]
            if self.state.get(param)
        ]
        with torch.no_grad():
            for param, y, z, beta1 in originals:
                param.copy_((y - (1 - beta1) * z) / beta1)
        self._is_averaged = True
        try:
            yield
        finally:
            self._is_averaged = False
            with torch.no_grad():
                for param, y, _, _ in originals:
                    param.copy_(y)


def build(
    params: Params, config: OptimizerConfig, learning_rate: float, weight_decay: float, seed: int = 0
) -> ScheduleFreeAdamW:
    """Build schedule-free AdamW with default betas (0.9, 0.999) and eps 1e-8."""
    settings = {"betas": (config.beta1 or 0.9, config.beta2 or 0.999), "eps": config.eps or 1e-8}
    return ScheduleFreeAdamW(as_list(params), {"lr": learning_rate, "weight_decay": weight_decay, **settings})


PART = OptimizerPart(
    build=build,
    uses=frozenset({"beta1", "beta2", "eps"}),
    usual_rates=(3e-5, 1e-2),
    elementwise=True,
    averages=True,
)
