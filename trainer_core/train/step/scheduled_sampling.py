"""Which micro-batches are rolled out (flow/rollout.py), and the passes of the model that it takes.

A micro-batch is rolled out as a whole: its shapes stay those that blocks are compiled for, and weights that come and go come once
for all of it. Samples that keep the model as it is stay on the straight path: their target is the base's prediction there.
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
    """The micro-batch where the model itself has come to, with the target from there. Without dropout, as pictures are drawn."""
    assert batch.levels is not None and batch.x0 is not None

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        return state.family.predict(state.transformer, x, sigma, batch.text, **batch.beside)

    with without_dropout(state.layers):
        x_hat = descend(predict, batch.x_sigma, batch.levels)
    target, share = way_back(x_hat, batch.x0, batch.levels)
    return replace(batch, x_sigma=x_hat, velocity=target, share=share)
