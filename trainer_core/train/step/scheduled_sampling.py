"""Scheduled sampling: denoise some micro-batches with the model itself before the loss is taken (flow/rollout.py).

A micro-batch is rolled out as a whole. Its shapes stay those that the blocks are compiled for, and offloaded weights
are loaded once for all its samples. Samples with prior preservation stay on the straight path, because their target is
the base model's prediction there.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...adapters.inject import without_dropout
from ...flow.rollout import descend, way_back
from .state import Batch, TrainState


@torch.no_grad()
def roll_out(state: TrainState, batch: Batch) -> Batch:
    """Return the micro-batch at the latents that the model itself denoises to, with the target from there.

    The rollout runs without dropout, as validation images are sampled.
    """
    assert batch.levels is not None and batch.x0 is not None

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        return state.family.predict(state.transformer, x, sigma, batch.text, **batch.beside)

    with without_dropout(state.layers):
        x_hat = descend(predict, batch.x_sigma, batch.levels)
    target, share = way_back(x_hat, batch.x0, batch.levels)
    return replace(batch, x_sigma=x_hat, velocity=target, share=share)
