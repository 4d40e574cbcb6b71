"""Adafactor: stores squared gradients only per row and per column, so its state needs almost no memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config.optimizer import OptimizerConfig
from .foreach import ExactOptimizer, Lot, count_
from .optimizer import OptimizerPart, Params, as_list

EPS_SQUARE = 1e-30  # epsilon 1 and 2 of the paper, section 8
EPS_SIZE = 1e-3


class Adafactor(ExactOptimizer):
    """V = mean of g^2 + 1e-30 with decay 1 - t^-0.8, factored into rows and columns (factored_state)

    u = g / sqrt(V), clipped to a root mean square of 1;   with beta1: u = m = b1 m + (1 - b1) u
    w -= rate (u + decay w),   rate = lr, or lr max(0.001, rms(w)) with scale_parameter

    The loop's learning rate replaces the paper's own schedule, min(0.01, 1 / sqrt(t)).

    Source: Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4 to 6.
    """

    stored_name = "Adafactor"

    def initial(self, param: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
        direction = {"m": torch.zeros_like(param)} if group["beta1"] else {}
        return {"step": 0, **factored_state("v", param), **direction}

    def move_(self, params: Lot, grads: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any]) -> None:
        beta2 = 1 - count_(states) ** -0.8
        for param, grad, state in zip(params, grads, states, strict=True):
            update_factored_(state, "v", grad.square() + EPS_SQUARE, beta2)
            update = clip_rms(grad * factored_rsqrt(state, "v"))
            if group["beta1"]:
                update = state["m"].lerp_(update, 1 - group["beta1"])
            rate: Any = group["lr"]
            if group["scale_parameter"]:
                rate = rate * param.square().mean().sqrt().clamp(min=EPS_SIZE)
            param.sub_(rate * (update + group["weight_decay"] * param))


def build(
    params: Params, config: OptimizerConfig, learning_rate: float, weight_decay: float, seed: int = 0
) -> Adafactor:
    """Build Adafactor. It has no momentum unless beta1 is set."""
    settings = {"beta1": config.beta1, "scale_parameter": config.adafactor_scale_parameter}
    return Adafactor(as_list(params), {"lr": learning_rate, "weight_decay": weight_decay, **settings})


PART = OptimizerPart(build=build, uses=frozenset({"beta1", "adafactor_scale_parameter"}), usual_rates=(1e-5, 1e-3))


def factored_state(name: str, param: Tensor) -> dict[str, Any]:
    """Return the state of a (..., n, m) tensor: rows (..., n) and columns (..., m). Below 2-D it is not factored."""
    if param.dim() < 2:
        return {name: torch.zeros_like(param)}
    rows, columns = param.new_zeros(param.shape[:-1]), param.new_zeros(param.shape[:-2] + param.shape[-1:])
    return {f"{name}_rows": rows, f"{name}_columns": columns}


def update_factored_(state: dict[str, Any], name: str, squares: Tensor, beta: float) -> None:
    """Update the factored means: mean = beta mean + (1 - beta) squares."""
    if name in state:
        state[name].lerp_(squares, 1 - beta)
        return
    state[f"{name}_rows"].lerp_(squares.mean(-1), 1 - beta)
    state[f"{name}_columns"].lerp_(squares.mean(-2), 1 - beta)


def factored_rsqrt(state: dict[str, Any], name: str) -> Tensor:
    """Return 1 / sqrt(V) with V_ij = rows_i columns_j / mean(rows), which preserves V's row and column sums.

    Source: Shazeer and Stern 2018, arXiv:1804.04235, algorithm 1.
    """
    if name in state:
        return state[name].rsqrt()
    rows, columns = state[f"{name}_rows"], state[f"{name}_columns"]
    return (rows / rows.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)


def clip_rms(update: Tensor, limit: float = 1.0) -> Tensor:
    """Scale the update so that its root mean square is at most `limit`."""
    return update / (update.square().mean().sqrt() / limit).clamp(min=1.0)
