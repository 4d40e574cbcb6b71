"""Which micro-batches are rolled out (flow/rollout.py), and the passes of the model that it takes.

A micro-batch is rolled out as a whole: its shapes stay those that blocks are compiled for, and weights that come and go come once
for all of it. Samples that keep the model as it is stay on the straight path: their target is the base's prediction there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...adapters.inject import undropped
from ...config.training import TrainingConfig
from ...flow.rollout import descend, rollout_levels, way_back
from ...seeds import generator
from .prefetch import Batch

if TYPE_CHECKING:
    from .loop import Run


def drawn_levels(config: TrainingConfig, micro: int, sigma: Tensor, prior: Tensor | None) -> Tensor | None:
    """Noise levels of micro-batch number `micro`'s rollout, (steps + 1, B), on the CPU; None where it has none.

    Args:
        sigma: (B,). prior: (B,), bool, or None: samples whose levels are all sigma, so that their steps lead nowhere.
    """
    if not config.rollout_probability or (prior is not None and bool(prior.all())):
        return None
    draw = generator(config.seed, "rollout", micro)
    if torch.rand((), generator=draw).item() >= config.rollout_probability:
        return None
    num_steps = int(torch.randint(1, config.rollout_steps + 1, (), generator=draw).item())
    levels = rollout_levels(sigma, num_steps)
    return levels if prior is None else torch.where(prior, sigma, levels)


@torch.no_grad()
def rolled_out(run: Run, batch: Batch) -> Batch:
    """The micro-batch where the model itself has come to, with the target from there. Without dropout, as pictures are drawn."""
    assert batch.levels is not None and batch.x0 is not None

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        return run.family.predict(run.transformer, x, sigma, batch.text, **batch.beside)

    with undropped(run.layers):
        x_hat = descend(predict, batch.x_sigma, batch.levels)
    target, share = way_back(x_hat, batch.x0, batch.levels)
    return replace(batch, x_sigma=x_hat, velocity=target, share=share)
