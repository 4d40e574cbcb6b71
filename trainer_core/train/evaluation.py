"""One figure of how well the model fits the data: the loss at fixed samples, fixed noise and fixed sigmas, comparable across runs."""

from __future__ import annotations

import torch

from ..flow.loss import velocity_loss
from ..flow.path import interpolate
from ..seeds import generator
from .loop import Run

SIGMAS = (0.125, 0.375, 0.625, 0.875)
MAX_SAMPLES = 16
EVALUATION_SEED = 0  # fixed: the figure must not change with the run's seed


@torch.no_grad()
def eval_loss(run: Run) -> float:
    """Mean velocity loss over at most 16 samples, evenly spread over the dataset, at 4 sigmas each, with their first caption."""
    count = min(MAX_SAMPLES, len(run.samples))
    losses = []
    for sample in (run.samples[i * len(run.samples) // count] for i in range(count)):
        x0 = run.latents.get(sample)[None].float()
        noise = torch.randn(x0.shape, generator=generator(EVALUATION_SEED, "evaluation", sample.key))
        text = run.text.get(sample.captions[0]).to(run.device)
        for value in SIGMAS:
            sigma = torch.tensor([value])
            x_sigma, velocity = interpolate(x0, noise, sigma)
            prediction = run.family.predict(run.transformer, x_sigma.to(run.device), sigma.to(run.device), [text])
            losses.append(velocity_loss(prediction, velocity.to(run.device)).mean().item())
    return sum(losses) / len(losses)
