"""The algorithm: batch -> sigma -> x_sigma -> predict -> loss -> backward -> step -> hooks.

    x_sigma = (1 - sigma) x0 + sigma noise,   loss = mean |v_theta(x_sigma, sigma, text) - (noise - x0)|^2

All that is random in step k is drawn from generators seeded by (run seed, purpose, micro-batch, sample), never from a global state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ...adapters.inject import set_micro_, set_strength_
from ...flow.loss import velocity_loss
from ...host import Host, Notice, StepReport
from ...optim.lr_schedule import rate_of
from ...optim.optimizer import effective_rate, set_rate_
from .batch import make_batch
from .nan_guard import describe_skipped, refuse_or_skip
from .prefetch import prefetch_batches
from .scheduled_sampling import roll_out
from .state import Batch, Fetch, Hook, TrainState


def fit(run: TrainState, host: Host, hooks: Sequence[Hook] = ()) -> None:
    """Train from run.step to run.num_steps; every hook is called after every step.

    Raises:
        Cancelled (or the host's own interrupt): between two steps, so that run is whole.
        UserError: the loss or the gradient is not finite; the weights are those of the step before.
    """
    end = run.num_steps * run.config.accumulation
    with prefetch_batches(lambda micro: make_batch(run, micro), run.device, end) as fetch:
        while run.step < run.num_steps:
            host.check_cancelled()
            began = time.perf_counter()
            rate = rate_of(run.step, run.config, run.optimizer_config, run.num_steps)
            loss, norm = train_step(run, rate, fetch)
            run.step += 1
            run.losses.append(loss)
            rate = effective_rate(run.optimizer, rate)
            run.learning_rates.append(rate)
            run.step_seconds.append(time.perf_counter() - began)
            if math.isfinite(loss):
                host.emit(StepReport(run.step, run.num_steps, loss, rate, norm, run.step_seconds[-1]))
            else:
                host.emit(Notice(describe_skipped(run), "warning"))
            for hook in hooks:
                hook(run)


def train_step(run: TrainState, learning_rate: float, fetch: Fetch | None = None) -> tuple[float, float]:
    """One optimiser step over `accumulation` micro-batches. Returns the mean loss and the gradient's norm before clipping."""
    set_rate_(run.optimizer, learning_rate)
    first = run.step * run.config.accumulation
    total = _accumulate_gradients(run, first, fetch)
    limit = run.config.max_grad_norm or math.inf
    norm = nn.utils.clip_grad_norm_(run.parameters, limit)
    loss_value, norm_value = torch.stack([total, norm.to(total)]).tolist()  # the step's only wait for the device
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        refuse_or_skip(run, first, loss_value, norm_value)
        run.optimizer.zero_grad(set_to_none=True)
        return math.nan, math.nan
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.update_(run.layers)
    return loss_value, norm_value


def _accumulate_gradients(run: TrainState, first: int, fetch: Fetch | None) -> Tensor:
    """Add up the gradients of a step's micro-batches, the first of them number `first`; returns the mean loss, on the device."""
    while True:
        try:
            total, loss = torch.zeros((), device=run.device), None
            with run.working.active() if run.working else nullcontext():
                for micro in range(first, first + run.config.accumulation):
                    set_micro_(run.layers, micro)
                    loss = micro_loss(run, micro, fetch) / run.config.accumulation
                    loss.backward()
                    if run.working:
                        run.working.collect_()
                    total += loss.detach()
            return total
        except Exception as error:
            if run.relief is None or not run.relief.helps(error):
                raise
        finally:
            set_micro_(run.layers, None)
        run.optimizer.zero_grad(set_to_none=True)
        loss = None  # where the backward pass broke off it holds all that was stored
        run.relief.take_()


def micro_loss(run: TrainState, micro: int, fetch: Fetch | None = None) -> Tensor:
    """Mean loss of micro-batch number `micro`, counted from the run's beginning. fetch: makes it; None: made here."""
    batch = (fetch(micro) if fetch else make_batch(run, micro)).to(run.device)
    if batch.levels is not None:
        batch = roll_out(run, batch)
    target = batch.velocity if batch.prior is None else with_prior(run, batch)
    prediction = run.family.predict(
        run.transformer, batch.x_sigma, batch.sigma, batch.text, route=batch.route, **batch.beside
    )
    if batch.share is not None:
        prediction = batch.share * prediction
    return velocity_loss(prediction, target, batch.weight).mean()


@torch.no_grad()
def with_prior(run: TrainState, batch: Batch) -> Tensor:
    """The path's velocity, and in its place the base's own prediction for samples that keep the model as it is: (B, C, h, w).

    Ruiz et al. 2022, arXiv:2208.12242 draw pictures with the base and train on those; its prediction for the very input says the same
    without sampling, at every noise level. On the batch's route: an update of 0 is to have nothing to correct.
    """
    assert batch.prior is not None
    set_strength_(run.transformer, 0.0)
    try:
        base = run.family.predict(
            run.transformer, batch.x_sigma, batch.sigma, batch.text, route=batch.route, **batch.beside
        )
    finally:
        set_strength_(run.transformer, 1.0)
    return torch.where(batch.prior[:, None, None, None], base.to(batch.velocity), batch.velocity)
