"""Targets that are the base model's own predictions.

For images with prior preservation, and for captions without the trigger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...adapters.inject import without_updates
from ...flow.loss import velocity_loss
from .batch import make_batch
from .state import Batch, Fetch, TrainState


@contextmanager
def base_model(state: TrainState) -> Iterator[None]:
    """Predict without the LoRA until the context exits."""
    with without_updates(state.transformer):
        yield


@contextmanager
def added_apart(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Sum up the gradients of the context by themselves, and then add them to those of before.

    So a micro-batch with several losses adds the same bytes wherever it is computed: on another device, nothing is
    there before.
    """
    earlier = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    yield
    for parameter, grad in zip(parameters, earlier, strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)


@torch.no_grad()
def prior_target(state: TrainState, batch: Batch) -> Tensor:
    """Return the training target with prior preservation, (B, C, h, w).

    For samples with prior preservation it is the base model's own prediction, for all others the velocity.

    Ruiz et al. 2022, arXiv:2208.12242, sample images with the base model and train on those. Its prediction for the
    same input gives the same signal without sampling, at every sigma. It takes the same token route as the batch, so
    that an update of 0 has a loss of 0.
    """
    assert batch.prior is not None
    with base_model(state):
        base = state.family.predict(
            state.transformer, batch.x_sigma, batch.sigma, batch.text, route=batch.route, **batch.beside
        )
    return torch.where(batch.prior[:, None, None, None], base.to(batch.velocity), batch.velocity)


def preservation_loss(state: TrainState, micro: int, fetch: Fetch | None = None) -> Tensor:
    """Return the loss of one micro-batch that holds predictions at those of the base model, times its weight.

    The prediction of the base model for the caption with the class word in place of the trigger is the target of the
    prediction with the LoRA, at the same noise level. In a rollout this is the level where it starts. Samples with
    prior preservation are included: their own loss holds the prediction for their caption.

    Args:
        micro: number of the micro-batch, counted from the start of the run.
        fetch: returns the batch of this number. None: the batch is made here.
    """
    batch = (fetch(micro) if fetch else make_batch(state, micro)).to(state.device)
    sigma = batch.sigma if batch.levels is None else batch.levels[0]

    def predict() -> Tensor:
        return state.family.predict(
            state.transformer, batch.x_sigma, sigma, batch.class_text, route=batch.route, **batch.beside
        )

    with torch.no_grad(), base_model(state):
        target = predict()
    weight = batch.weight if batch.route is not None else None  # a mask does not say what may change elsewhere
    losses = velocity_loss(predict(), target, weight, state.config.loss, state.config.huber_c)
    return state.config.preservation * batch.mean_loss(losses)
