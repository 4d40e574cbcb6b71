"""A step of kind full whose weights are shared out over the ranks (full_rank/sharding.py).

The ranks compute the micro-batches of a step in rounds, and all of them take part in each forward and backward pass. In
the backward pass of the last round the sums of the gradients become complete, block by block. Where nothing needs all of
them at once, each weight steps there and its gradient is freed. Where this step's norm clips them, they wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ....full_rank.sharding import Consume, Shard, Sharding
from ....full_rank.step_in_backward import StepInBackward
from ..nan_guard import refuse_half_step, refuse_or_skip
from ..state import Fetch, TrainState
from .clipping import CLIP_EPS, clip_factor

Loss = Callable[[TrainState, int, Fetch | None], Tensor]


def sharded_step(
    state: TrainState, stepper: StepInBackward, sharding: Sharding, compute_loss: Loss, fetch: Fetch | None = None
) -> tuple[float, float]:
    """Run one step. Arguments and result are those of full_rank_step."""
    waits = state.optimizer_config.clips_by_this_step(state.config.max_grad_norm)
    gradients: dict[Shard, Tensor] = {}
    rows: list[Tensor] = []
    factor = 1.0 if waits else clip_factor(state)

    def step(shard: Shard, gradient: Tensor, factor: float) -> None:
        stepper.step_(shard.local, state.step, factor, gradient)

    def consume(shard: Shard, gradient: Tensor) -> None:
        rows.append(_norms_of_rows(gradient))
        if waits:
            gradients[shard] = gradient
        else:
            step(shard, gradient, factor)

    try:
        loss = _backward(state, sharding, compute_loss, fetch, consume, moves=not waits)
    finally:
        sharding.clear()
    state.grad_norm = _norm(state, rows)
    if not math.isfinite(state.grad_norm):
        state.ranks.ends_together = True
        if not waits:
            refuse_half_step(state, state.first_micro, loss, state.grad_norm)
        refuse_or_skip(state, state.first_micro, loss, state.grad_norm)
    if waits:
        factor = min(1.0, state.config.max_grad_norm / (state.grad_norm + CLIP_EPS))
        state.is_consistent = False  # until finish_step_
        for shard in [*gradients]:
            step(shard, gradients.pop(shard), factor)
    if state.ema is not None:
        state.ema.update_(state.layers)
    return loss, state.grad_norm


def _backward(
    state: TrainState, sharding: Sharding, compute_loss: Loss, fetch: Fetch | None, consume: Consume, moves: bool
) -> float:
    """Compute the gradients of a step's micro-batches. Return the mean loss.

    Args:
        consume: Gets them in the last round, see Sharding.round.
        moves: Whether it moves weights.
    """
    ranks, count = state.ranks, state.config.accumulation
    losses: list[float] = []
    for start in range(0, count, ranks.size):
        loss = compute_loss(state, state.first_micro + start + ranks.rank, fetch) / count
        losses += ranks.together(partial(float, loss.detach()))
        if not math.isfinite(sum(losses)):
            ranks.ends_together = True
            refuse_or_skip(state, state.first_micro, sum(losses), math.nan)
        is_last = start + ranks.size >= count
        if is_last and moves:
            state.is_consistent = False  # until finish_step_: weights, optimizer, average and history belong together
        with sharding.round(consume if is_last else None):
            loss.backward()
    return sum(losses)


def _norms_of_rows(gradient: Tensor) -> Tensor:
    """Return the norm of each row, fp32: a row is whole on one device, whatever their number."""
    return torch.linalg.vector_norm(gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None], dim=1)


def _norm(state: TrainState, rows: list[Tensor]) -> float:
    """Return the norm of all gradients of all ranks, rounded to fp32, because the order of the sum depends on their number."""
    own = float(torch.cat(rows).cpu().double().square().sum())
    return float(torch.tensor(math.sqrt(sum(state.ranks.together(lambda: own))), dtype=torch.float32))
