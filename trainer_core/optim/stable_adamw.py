"""StableAdamW: AdamW with smaller steps for a matrix whose gradient has suddenly grown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config.optimizer import OptimizerConfig
from .foreach import ExactOptimizer, Lot, count_, each, of
from .optimizer import OptimizerPart, Params, as_list


class StableAdamW(ExactOptimizer):
    """With b'(t) = b (1 - b^(t-1)) / (1 - b^t), which makes a later bias correction unnecessary:

    m = b1' m + (1 - b1') g,   v = b2' v + (1 - b2') g^2
    rms = sqrt(mean(g^2 / max(v, eps^2))) over the matrix,   rate = lr / max(1, rms)
    w -= rate (m / (sqrt(v) + eps) + decay w)

    Gradient clipping is rarely needed with it (max_grad_norm 0).

    Source: Wortsman et al. 2023, arXiv:2304.13013, algorithm 2.
    """

    stored_name = "StableAdamW"

    def initial(self, param: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"step": 0, "m": torch.zeros_like(param), "v": torch.zeros_like(param)}

    def move_(self, params: Lot, grads: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any]) -> None:
        m, v, eps = of(states, "m"), of(states, "v"), group["eps"]
        step = count_(states)
        beta1, beta2 = (beta * (1 - beta ** (step - 1)) / (1 - beta**step) for beta in group["betas"])
        each.mul_(m, beta1)
        each.add_(m, grads, alpha=1 - beta1)
        each.mul_(v, beta2)
        each.addcmul_(v, grads, grads, 1 - beta2)
        ratio = each.mul(grads, grads)
        each.div_(ratio, each.clamp_min(v, eps**2))
        rates = [group["lr"] / one.mean().sqrt().clamp(min=1.0) for one in ratio]
        size = each.sqrt(v)
        each.add_(size, eps)
        update = each.div(m, size)
        each.add_(update, params, alpha=group["weight_decay"])
        each.mul_(update, rates)
        each.sub_(params, update)


def build(
    params: Params, config: OptimizerConfig, learning_rate: float, weight_decay: float, seed: int = 0
) -> StableAdamW:
    """Build StableAdamW with default betas (0.9, 0.99) and eps 1e-6."""
    settings = {"betas": (config.beta1 or 0.9, config.beta2 or 0.99), "eps": config.eps or 1e-6}
    return StableAdamW(as_list(params), {"lr": learning_rate, "weight_decay": weight_decay, **settings})


PART = OptimizerPart(build=build, uses=frozenset({"beta1", "beta2", "eps"}), usual_rates=(1e-5, 1e-3))
