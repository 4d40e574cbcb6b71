"""The training loop: batch -> sigma -> x_sigma -> predict -> loss -> backward -> optimizer step -> hooks.

    x_sigma = (1 - sigma) x0 + sigma noise
    loss    = mean |v_theta(x_sigma, sigma, text) - (noise - x0)|^2    (`loss` and `loss_weighting`: flow/loss.py)

All randomness in step k comes from generators seeded by (run seed, purpose, micro-batch, sample), never from a global
random state. A resumed or retried step therefore computes the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ...adapters.inject import set_micro_
from ...flow.loss import velocity_loss
from ...host import Host, Notice, StepReport
from ...optim.lr_schedule import rate_of
from ...optim.optimizer import effective_rate, set_rate_
from .batch import make_batch
from .full_rank.full_rank_step import full_rank_step
from .nan_guard import describe_skipped, refuse_or_skip
from .prefetch import prefetch_batches
from .preservation import added_apart, preservation_loss, prior_target
from .retried_step import with_recovery, within_range
from .scheduled_sampling import roll_out
from .state import Fetch, Hook, TrainState


def fit(state: TrainState, host: Host, hooks: Sequence[Hook] = ()) -> None:
    """Train from state.step to state.num_steps, or to where a hook sets stop_reason. Every step calls every hook.

    Raises:
        Cancelled (or the host's own interrupt): only between two steps, so that the state is consistent.
        UserError: the loss or the gradient is not finite. The weights are those of the step before.
    """
    end, following = state.end_micro, state.next_micro
    with prefetch_batches(lambda micro: make_batch(state, micro), state.device, end, following) as fetch:
        while not state.is_over:
            state.ranks.agree(host.check_cancelled)
            start = time.perf_counter()
            rate = rate_of(state.step, state.config, state.optimizer_config, state.num_steps)
            loss, norm = train_step(state, rate, fetch)
            rate = effective_rate(state.optimizer, rate)
            state.finish_step_(loss, rate, time.perf_counter() - start)
            if math.isfinite(loss):
                host.emit(StepReport(state.step, state.num_steps, loss, rate, norm, state.step_seconds[-1]))
            else:
                host.emit(Notice(describe_skipped(state), "warning"))
            for hook in hooks:
                hook(state)


def train_step(state: TrainState, learning_rate: float, fetch: Fetch | None = None) -> tuple[float, float]:
    """Run one optimizer step over `accumulation` micro-batches.

    Returns:
        The mean loss and the gradient norm before clipping; NaN for both where the step was skipped.
    """
    set_rate_(state.optimizer, learning_rate)
    if state.in_backward:
        return full_rank_step(state, state.in_backward, micro_loss, fetch)
    first = state.first_micro
    loss_value, norm_value = within_range(state, lambda: _accumulate_gradients(state, first, fetch))
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        refuse_or_skip(state, first, loss_value, norm_value)
        state.optimizer.zero_grad(set_to_none=True)
        return math.nan, math.nan
    state.is_consistent = False  # until finish_step_: weights, optimizer, average and history belong together
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update_(state.layers)
    return loss_value, norm_value


def _accumulate_gradients(state: TrainState, first: int, fetch: Fetch | None) -> Tensor:
    """Add up the gradients of a step's micro-batches, from number `first` on. Return the mean loss, on the device."""
    micros = range(first, first + state.config.accumulation)

    def add_up() -> Tensor:
        total = torch.zeros((), device=state.device)
        with state.working.active() if state.working else nullcontext():
            for micro in micros:
                total += _backward(state, micro, fetch)
        return total

    if state.ranks.size == 1:
        return with_recovery(state, add_up)
    with state.working.active() if state.working else nullcontext():
        return state.ranks.add_gradients_(  # out of memory on one rank repeats its micro-batch, not the others' step
            state.parameters, micros, lambda micro: with_recovery(state, lambda: _backward(state, micro, fetch))
        )


def _backward(state: TrainState, micro: int, fetch: Fetch | None) -> Tensor:
    """Add a micro-batch's share of the step's gradient to .grad, and return its share of the loss."""
    set_micro_(state.layers, micro)
    batch = (fetch(micro) if fetch else make_batch(state, micro)).to(state.device)
    parts = (micro_loss, preservation_loss) if batch.class_text else (micro_loss,)
    total = torch.zeros((), device=state.device)
    with added_apart(state.parameters) if len(parts) > 1 else nullcontext():
        for part in parts:  # each by itself, so that the activations of one are in memory at a time
            loss = part(state, micro, lambda _: batch) / state.config.accumulation
            (loss * state.loss_scale.value if state.loss_scale else loss).backward()
            if state.working:
                state.working.collect_()
            total += loss.detach()
    return total


def micro_loss(state: TrainState, micro: int, fetch: Fetch | None = None) -> Tensor:
    """Return the mean loss of one micro-batch.

    Args:
        micro: number of the micro-batch, counted from the start of the run.
        fetch: returns the batch of this number. None: the batch is made here.
    """
    batch = (fetch(micro) if fetch else make_batch(state, micro)).to(state.device)
    if batch.levels is not None:
        batch = roll_out(state, batch)
    target = batch.velocity if batch.prior is None else prior_target(state, batch)
    prediction = state.family.predict(
        state.transformer, batch.x_sigma, batch.sigma, batch.text, route=batch.route, **batch.beside
    )
    prediction = prediction if batch.share is None else batch.share * prediction
    return batch.mean_loss(velocity_loss(prediction, target, batch.weight, state.config.loss, state.config.huber_c))
