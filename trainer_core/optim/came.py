"""CAME: Adafactor with momentum, with smaller steps where updates deviate from their average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config.optimizer import OptimizerConfig
from .adafactor import clip_rms, factored_rsqrt, factored_state, update_factored_
from .foreach import ExactOptimizer, Lot
from .optimizer import OptimizerPart, Params, as_list

EPS_SQUARE = 1e-30  # epsilon 1 and 2 of the paper, section 4
EPS_STRAY = 1e-16


class Came(ExactOptimizer):
    """V = b2 V + (1 - b2) (g^2 + 1e-30), factored into rows and columns (adafactor.factored_state)

    u = g / sqrt(V), clipped to a root mean square of 1;   m = b1 m + (1 - b1) u
    S = b3 S + (1 - b3) ((u - m)^2 + 1e-16), factored into rows and columns
    w -= lr (m / sqrt(S) + decay w)

    The paper only defines the step for matrices; a vector moves by lr m, without S.

    Source: Luo et al. 2023, arXiv:2307.02047, algorithm 2.
    """

    stored_name = "Came"

    def initial(self, param: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
        stray = factored_state("stray", param) if param.dim() > 1 else {}
        return {"m": torch.zeros_like(param), **factored_state("v", param), **stray}

    def move_(self, params: Lot, grads: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any]) -> None:
        beta1, beta2, beta3 = group["betas"]
        for param, grad, state in zip(params, grads, states, strict=True):
            update_factored_(state, "v", grad.square() + EPS_SQUARE, beta2)
            update = clip_rms(grad * factored_rsqrt(state, "v"))
            direction = state["m"].lerp_(update, 1 - beta1)
            if param.dim() > 1:
                update_factored_(state, "stray", (update - direction).square() + EPS_STRAY, beta3)
                direction = direction * factored_rsqrt(state, "stray")
            param.sub_(group["lr"] * (direction + group["weight_decay"] * param))


def build(params: Params, config: OptimizerConfig, learning_rate: float, weight_decay: float, seed: int = 0) -> Came:
    """Build CAME with default betas (0.9, 0.999, 0.9999)."""
    betas = (config.beta1 or 0.9, config.beta2 or 0.999, config.beta3 or 0.9999)
    return Came(as_list(params), {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas})


PART = OptimizerPart(build=build, uses=frozenset({"beta1", "beta2", "beta3"}), usual_rates=(1e-6, 5e-4))
