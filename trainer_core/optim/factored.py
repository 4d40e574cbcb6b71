"""A matrix of means of squares, kept as the means of its rows and of its columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def initial(name: str, param: Tensor) -> dict[str, Any]:
    """What is kept of a (..., n, m) tensor: rows (..., n) and columns (..., m). One dimension or none: all of it."""
    if param.dim() < 2:
        return {name: torch.zeros_like(param)}
    rows, columns = param.new_zeros(param.shape[:-1]), param.new_zeros(param.shape[:-2] + param.shape[-1:])
    return {f"{name}_rows": rows, f"{name}_columns": columns}


def average_(state: dict[str, Any], name: str, squares: Tensor, beta: float) -> None:
    """mean = beta mean + (1 - beta) squares, of what is kept."""
    if name in state:
        state[name].lerp_(squares, 1 - beta)
        return
    state[f"{name}_rows"].lerp_(squares.mean(-1), 1 - beta)
    state[f"{name}_columns"].lerp_(squares.mean(-2), 1 - beta)


def inverse_root(state: dict[str, Any], name: str) -> Tensor:
    """1 / sqrt(V) with V_ij = rows_i columns_j / mean(rows), which keeps the sums of V's rows and columns.

    Source: Shazeer and Stern 2018, arXiv:1804.04235, algorithm 1.
    """
    if name in state:
        return state[name].rsqrt()
    rows, columns = state[f"{name}_rows"], state[f"{name}_columns"]
    return (rows / rows.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)


def clipped(update: Tensor, limit: float = 1.0) -> Tensor:
    """The update, shortened so that its root mean square is at most `limit`."""
    return update / (update.square().mean().sqrt() / limit).clamp(min=1.0)
