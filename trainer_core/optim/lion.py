"""Lion: every weight moves by the same amount, by the sign of its averaged gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config.optimizer import OptimizerConfig
from .foreach import ExactOptimizer, Lot, each, of
from .optimizer import OptimizerPart, Params, as_list


class Lion(ExactOptimizer):
    """c = b1 m + (1 - b1) g,   w -= lr (sign(c) + decay w),   m = b2 m + (1 - b2) g

    One state tensor per parameter. Steps are larger than AdamW's: use a 3 to 10 times smaller learning rate, and a
    weight decay larger by the same factor.

    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """

    stored_name = "Lion"

    def initial(self, param: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"m": torch.zeros_like(param)}

    def move_(self, params: Lot, grads: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any]) -> None:
        m, (beta1, beta2), rate = of(states, "m"), group["betas"], group["lr"]
        direction = each.mul(m, beta1)
        each.add_(direction, grads, alpha=1 - beta1)
        each.sign_(direction)
        each.mul_(params, 1 - rate * group["weight_decay"])
        each.add_(params, direction, alpha=-rate)
        each.mul_(m, beta2)
        each.add_(m, grads, alpha=1 - beta2)


def build(params: Params, config: OptimizerConfig, learning_rate: float, weight_decay: float, seed: int = 0) -> Lion:
    """Build Lion with default betas (0.9, 0.99)."""
    betas = (config.beta1 or 0.9, config.beta2 or 0.99)
    return Lion(as_list(params), {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas})


PART = OptimizerPart(build=build, uses=frozenset({"beta1", "beta2"}), usual_rates=(1e-6, 2e-4), elementwise=True)
