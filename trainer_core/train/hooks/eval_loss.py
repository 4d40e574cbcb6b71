"""One figure of how well the model fits the data: the loss at fixed samples, fixed noise and fixed sigmas, comparable across runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from ...data.sample_table import Chosen, Sample, columns
from ...flow.loss import velocity_loss
from ...flow.path import interpolate
from ...seeds import generator
from ..step.batch import stack_masks, stack_references
from ..step.state import TrainState
from .eval_weights import final_weights

SIGMAS = (0.125, 0.375, 0.625, 0.875)
MAX_SAMPLES = 16
EVALUATION_SEED = 0  # fixed: the figure must not change with the run's seed


def eval_loss(run: TrainState) -> tuple[float, float]:
    """Mean velocity loss, and its standard error over the samples (0 for one sample).

    Over at most 16 samples, evenly spread over those held out (over all, where none are), at 4 sigmas each, with their
    first caption. With the weights to export, see averages.final_weights.
    """
    with final_weights(run):
        return _eval_loss(run)


@torch.no_grad()
def _eval_loss(run: TrainState) -> tuple[float, float]:
    samples = _eval_samples(run)
    count = min(MAX_SAMPLES, len(samples))
    losses = []
    for sample in (samples[i * len(samples) // count] for i in range(count)):
        x0 = run.latents.get(sample)[None].float()
        noise = torch.randn(x0.shape, generator=generator(EVALUATION_SEED, "evaluation", sample.key))
        text = run.text.get(sample.captions[0]).to(run.device)
        beside: dict[str, Any] = {
            name: tensor.to(run.device) for name, tensor in stack_references(run, [sample]).items()
        }
        weight = stack_masks(run, [sample])
        weight = None if weight is None else weight.to(run.device)
        values = []
        for value in SIGMAS:
            sigma = torch.tensor([value])
            x_sigma, velocity = interpolate(x0, noise, sigma)
            prediction = run.family.predict(
                run.transformer, x_sigma.to(run.device), sigma.to(run.device), [text], **beside
            )
            values.append(velocity_loss(prediction, velocity.to(run.device), weight).mean().item())
        losses.append(fmean(values))
    return fmean(losses), stdev(losses) / math.sqrt(count) if count > 1 else 0.0


def _eval_samples(run: TrainState) -> Sequence[Sample]:
    """Those held out, or all; but none that is to keep the model as it is, unless there are no others."""
    samples = run.held or run.samples
    if not run.prior_parts:
        return samples
    places = np.flatnonzero(~np.isin(columns(samples)["part"], list(run.prior_parts)))
    return Chosen(samples, places) if len(places) else samples


def best_step(run: TrainState) -> int | None:
    """The step with the lowest loss on the held-out samples; None where it was never taken."""
    return min(run.eval_losses, key=lambda step: (run.eval_losses[step][0], step)) if run.eval_losses else None
