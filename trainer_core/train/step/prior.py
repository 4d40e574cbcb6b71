"""Prior preservation: samples that are trained towards the base model's own prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from ...adapters.inject import set_strength_
from .state import Batch, TrainState


@torch.no_grad()
def prior_target(state: TrainState, batch: Batch) -> Tensor:
    """Return the training target with prior preservation, (B, C, h, w).

    For samples with prior preservation it is the base model's own prediction, for all others the velocity.

    Ruiz et al. 2022, arXiv:2208.12242, sample images with the base model and train on those. Its prediction for the
    same input gives the same signal without sampling, at every sigma. It takes the same token route as the batch, so
    that an update of 0 has a loss of 0.
    """
    assert batch.prior is not None
    set_strength_(state.transformer, 0.0)
    try:
        base = state.family.predict(
            state.transformer, batch.x_sigma, batch.sigma, batch.text, route=batch.route, **batch.beside
        )
    finally:
        set_strength_(state.transformer, 1.0)
    return torch.where(batch.prior[:, None, None, None], base.to(batch.velocity), batch.velocity)
