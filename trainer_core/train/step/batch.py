"""Make a micro-batch as a pure function of its number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config.training import TrainingConfig
from ...data.dataset import Sample
from ...flow.path import interpolate
from ...flow.rollout import rollout_levels
from ...seeds import generator
from .state import Batch, TrainState
from .token_drop import draw_route, loss_weight_of_kept


def make_batch(state: TrainState, micro: int) -> Batch:
    """Return micro-batch number `micro`, on the CPU.

    Latents and text embeddings come from the caches. Noise, sigma, caption choice, rollout and token route are sampled
    from generators that are seeded by the number.
    """
    batch = [state.samples[i] for i in state.plan.batch(micro)]
    x0 = torch.stack([state.latents.get(sample) for sample in batch])
    noise = torch.stack([
        torch.randn(x0.shape[1:], generator=generator(state.config.seed, "noise", micro, position, sample.key))
        for position, sample in enumerate(batch)
    ])  # fmt: skip
    sigma = state.density.at(x0[0, 0].numel()).sample(len(batch), generator(state.config.seed, "sigma", micro))
    text = [state.text.get(pick_prompt(state.config, sample, micro, position)) for position, sample in enumerate(batch)]
    is_prior = [sample.part in state.prior_parts for sample in batch]
    prior = torch.tensor(is_prior) if any(is_prior) else None
    levels = draw_rollout_levels(state.config, micro, sigma, prior)
    x_sigma, velocity = interpolate(x0, noise, sigma if levels is None else levels[0])
    beside, weight = stack_references(state, batch), stack_masks(state, batch)
    route = draw_route(state.config, len(state.family.blocks(state.transformer)), x_sigma, weight, micro)
    weight = weight if route is None else loss_weight_of_kept(route, x_sigma, weight)
    rolled = None if levels is None else x0
    return Batch(x_sigma, velocity, sigma, text, beside, weight, prior, levels, rolled, route=route)


def stack_masks(state: TrainState, batch: Sequence[Sample]) -> Tensor | None:
    """Return the loss weights of the batch's masks, (B, 1, h, w), on the CPU; None where the run has no masks."""
    return None if state.masks is None else torch.stack([state.masks.get(sample) for sample in batch])


def stack_references(state: TrainState, batch: Sequence[Sample]) -> dict[str, Tensor]:
    """Return the batch's reference latents as arguments of Family.predict, on the CPU; {} where the run has none."""
    if state.references is None:
        return {}
    return {"reference": torch.stack([state.references.get(sample) for sample in batch])}


def pick_prompt(config: TrainingConfig, sample: Sample, micro: int, position: int) -> str:
    """Return the caption of a sample in a micro-batch: one of its captions, or "" by caption dropout."""
    rng = generator(config.seed, "caption", micro, position, sample.key)
    if torch.rand((), generator=rng).item() < config.caption_dropout:
        return ""
    return sample.captions[int(torch.randint(len(sample.captions), (), generator=rng).item())]


def draw_rollout_levels(config: TrainingConfig, micro: int, sigma: Tensor, prior: Tensor | None) -> Tensor | None:
    """Return the sigmas of micro-batch number `micro`'s rollout, (steps + 1, B), on the CPU; None where it has none.

    Args:
        sigma: final noise level of each sample, (B,).
        prior: samples with prior preservation, (B,), bool, or None. All their levels are sigma, so that their rollout
            steps change nothing.
    """
    if not config.rollout_probability or (prior is not None and bool(prior.all())):
        return None
    rng = generator(config.seed, "rollout", micro)
    if torch.rand((), generator=rng).item() >= config.rollout_probability:
        return None
    num_steps = int(torch.randint(1, config.rollout_steps + 1, (), generator=rng).item())
    levels = rollout_levels(sigma, num_steps)
    return levels if prior is None else torch.where(prior, sigma, levels)
