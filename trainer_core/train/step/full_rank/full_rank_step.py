"""A step of a full-rank training (kind full): loss -> backward pass, in which the weights move (full_rank/)."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ....full_rank.step_in_backward import StepInBackward
from ..nan_guard import refuse_half_step, refuse_or_skip
from ..state import Fetch, TrainState
from .clipping import clip_factor
from .sharded_step import sharded_step

Loss = Callable[[TrainState, int, Fetch | None], Tensor]


def full_rank_step(
    state: TrainState, stepper: StepInBackward, compute_loss: Loss, fetch: Fetch | None = None
) -> tuple[float, float]:
    """Run one step, whose weights move inside of the backward pass.

    The loss is read before, because a step that has begun can't be undone. The host waits for the forward pass. Each
    rank computes one micro-batch (setup/full_rank_check.py). Where weights are shared out: see sharded_step.py.

    Args:
        compute_loss: micro_loss of loop.py.
        fetch: see micro_loss.
    Returns:
        The loss, and the gradient norm before clipping.
    """
    if state.sharding is not None:
        return sharded_step(state, stepper, state.sharding, compute_loss, fetch)
    first = state.first_micro
    try:
        loss = compute_loss(state, first + state.ranks.rank, fetch)
        if state.ranks.size > 1:
            loss = loss / state.ranks.size
        loss_value = sum(state.ranks.together(lambda: float(loss.detach())))
        if not math.isfinite(loss_value):
            refuse_or_skip(state, first, loss_value, math.nan)
        state.is_consistent = False  # until finish_step_: weights, optimizer, average and history belong together
        with stepper.active(state.step, clip_factor(state)):
            loss.backward()
    finally:
        state.optimizer.zero_grad(set_to_none=True)  # of a pass that was interrupted
    state.grad_norm = float(stepper.norm())
    if not math.isfinite(state.grad_norm):
        refuse_half_step(state, first, loss_value, state.grad_norm)
    if state.ema is not None:
        state.ema.update_(state.layers)
    return loss_value, state.grad_norm
