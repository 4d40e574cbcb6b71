"""Eval loss: the loss on fixed samples, fixed noise and fixed sigmas, comparable between steps and runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from ...adapters.inject import set_strength_
from ...config.training import EVAL_SIGMAS
from ...data.sample_table import Chosen, Sample, columns
from ...flow.loss import velocity_loss
from ...flow.path import interpolate
from ...host import EvalReport, Host, PhaseProgress, PhaseStarted
from ...seeds import generator
from ..step.batch import stack_masks, stack_references
from ..step.state import TrainState
from .eval_weights import final_weights

Eval = tuple[float, float]  # mean loss, and its standard error
EVALUATION_SEED = 0  # fixed: the eval loss must not depend on the run's seed


def eval_loss(state: TrainState, host: Host) -> tuple[float, float]:
    """Return the mean velocity loss and its standard error over the samples (0 for one sample).

    It is measured on at most `eval_images` samples at 4 sigmas each, with their first caption. They are spread evenly
    over the held-out samples, or over all samples where none are held out. The weights are those for export, see
    final_weights.

    Args:
        host: receives progress.
    Raises:
        Cancelled: between two samples.
    """
    with final_weights(state):
        return _eval_loss(state, host)


def evaluate(state: TrainState, host: Host) -> Eval | None:
    """Measure the loss and report it, unless a checkpoint has done so. None where `eval_images` is 0."""
    if not state.config.eval_images or state.step in state.eval_losses:
        return state.eval_losses.get(state.step)
    mean, error = eval_loss(state, host)
    host.emit(EvalReport(state.step, mean, error, held_out=bool(state.held)))
    return mean, error


def evaluate_start(state: TrainState, host: Host, is_beside_base: bool) -> tuple[Eval | None, Eval | None]:
    """Measure the loss of what the run starts from, and report it.

    Args:
        is_beside_base: whether that is another model than the base: a LoRA file, say. Then the base is measured too.
    Returns:
        The start's loss and standard error, and the base's; None where they are not measured.
    """
    base = None
    set_strength_(state.transformer, 0.0)
    try:
        if not is_beside_base:
            return evaluate(state, host), None
        base = eval_loss(state, host) if state.config.eval_images else None
    finally:
        set_strength_(state.transformer, 1.0)
    return evaluate(state, host), base


@torch.no_grad()
def _eval_loss(state: TrainState, host: Host) -> tuple[float, float]:
    samples = _eval_samples(state)
    count = min(state.config.eval_images, len(samples))
    host.emit(PhaseStarted("eval", count, "images"))

    def measure(number: int) -> float:
        host.check_cancelled()
        loss = _loss_of(state, samples[number * len(samples) // count])
        done = number - state.ranks.rank + state.ranks.size
        host.emit(PhaseProgress("eval", min(done, count), count))
        return loss

    losses = state.ranks.share_out(count, measure)
    return fmean(losses), stdev(losses) / math.sqrt(count) if count > 1 else 0.0


def _loss_of(state: TrainState, sample: Sample) -> float:
    """Return the mean loss of a sample over the sigmas of the evaluation."""
    x0 = state.latents.get(sample)[None].float()
    noise = torch.randn(x0.shape, generator=generator(EVALUATION_SEED, "evaluation", sample.key))
    text = state.text.get(sample.captions[0]).to(state.device)
    beside: dict[str, Any] = {
        name: tensor.to(state.device) for name, tensor in stack_references(state, [sample]).items()
    }
    weight = stack_masks(state, [sample])
    weight = None if weight is None else weight.to(state.device)
    values = []
    for value in EVAL_SIGMAS:
        sigma = torch.tensor([value])
        x_sigma, velocity = interpolate(x0, noise, sigma)
        prediction = state.family.predict(
            state.transformer, x_sigma.to(state.device), sigma.to(state.device), [text], **beside
        )
        values.append(velocity_loss(prediction, velocity.to(state.device), weight).mean())
    return fmean(torch.stack(values).tolist())  # one synchronization for all sigmas


def _eval_samples(state: TrainState) -> Sequence[Sample]:
    """Return the held-out samples, or all. Samples with prior preservation are left out, unless there are no others."""
    samples = state.held or state.samples
    if not state.prior_parts:
        return samples
    indices = np.flatnonzero(~np.isin(columns(samples)["part"], list(state.prior_parts)))
    return Chosen(samples, indices) if len(indices) else samples


def best_step(state: TrainState) -> int | None:
    """Return the step with the lowest loss on the held-out samples; None where it was never measured."""
    return min(state.eval_losses, key=lambda step: (state.eval_losses[step][0], step)) if state.eval_losses else None
