"""A step of a full-rank training (kind full): loss -> backward pass, in which the weights move (full_rank/)."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ...config.optimizer import STEP_BEFORE
from ...full_rank.step_in_backward import StepInBackward
from .nan_guard import refuse_half_step, refuse_or_skip
from .state import Fetch, TrainState

CLIP_EPS = 1e-6  # as in torch's clip_grad_norm_
Loss = Callable[[TrainState, int, Fetch | None], Tensor]


def full_rank_step(
    state: TrainState, stepper: StepInBackward, compute_loss: Loss, fetch: Fetch | None = None
) -> tuple[float, float]:
    """Run one step, whose weights move inside of the backward pass.

    The loss is read before, because a step that has begun can't be undone. The host waits for the forward pass. Each
    rank computes one micro-batch (setup/full_rank_check.py).

    Args:
        compute_loss: micro_loss of loop.py.
        fetch: see micro_loss.
    Returns:
        The loss, and the gradient norm before clipping.
    """
    first = state.first_micro
    try:
        loss = compute_loss(state, first + state.ranks.rank, fetch)
        if state.ranks.size > 1:
            loss = loss / state.ranks.size
        loss_value = sum(state.ranks.together(lambda: float(loss.detach())))
        if not math.isfinite(loss_value):
            refuse_or_skip(state, first, loss_value, math.nan)
        state.is_consistent = False  # until finish_step_: weights, optimizer, average and history belong together
        with stepper.active(state.step, _clip_factor(state)):
            loss.backward()
    finally:
        state.optimizer.zero_grad(set_to_none=True)  # of a pass that was interrupted
    state.grad_norm = float(stepper.norm())
    if not math.isfinite(state.grad_norm):
        refuse_half_step(state, first, loss_value, state.grad_norm)
    if state.ema is not None:
        state.ema.update_(state.layers)
    return loss_value, state.grad_norm


def _clip_factor(state: TrainState) -> float:
    """Return the factor of this step's gradients: it clips as if their norm were that of the step before."""
    limit = state.config.max_grad_norm
    if not limit or state.optimizer_config.clip_by != STEP_BEFORE or math.isnan(state.grad_norm):
        return 1.0
    return min(1.0, limit / (state.grad_norm + CLIP_EPS))
