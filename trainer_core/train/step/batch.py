"""Make a micro-batch as a pure function of its number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...config.dataset import FolderConfig
from ...config.training import TrainingConfig
from ...data.batch_sampler import BatchPlan
from ...data.captions import class_caption
from ...data.dataset import Sample
from ...flow.loss import sigma_weight
from ...flow.noise_choice import nearest_noise
from ...flow.path import interpolate
from ...flow.rollout import rollout_levels
from ...seeds import generator
from .state import Batch, TrainState
from .token_drop import draw_route, loss_weight_of_kept


def make_batch(state: TrainState, micro: int) -> Batch:
    """Return micro-batch number `micro`, on the CPU.

    Latents and text embeddings come from the caches. Noise, sigma, caption choice, mirroring, rollout and token route
    are sampled from generators that are seeded by the number.
    """
    batch = draw_samples(state.config, state.samples, state.plan, state.parts, micro)
    x0 = torch.stack([state.latents.get(sample) for sample in batch])
    noise = torch.stack([
        nearest_noise(
            x0[position], state.config.noise_choice,
            generator(state.config.seed, "noise", micro, position, sample.key),
        )
        for position, sample in enumerate(batch)
    ])  # fmt: skip
    patch = state.family.pixel_step // state.family.latent_factor
    sigma = state.density.at(x0[0, 0].numel() // patch**2).sample(
        len(batch), generator(state.config.seed, "sigma", micro)
    )
    prompts = [pick_prompt(state.config, sample, micro, position) for position, sample in enumerate(batch)]
    text = [state.text.get(prompt) for prompt in prompts]
    prior_parts = state.prior_parts
    is_prior = [sample.part in prior_parts for sample in batch]
    prior = torch.tensor(is_prior) if any(is_prior) else None
    levels = draw_rollout_levels(state.config, micro, sigma, prior)
    x_sigma, velocity = interpolate(x0, noise, sigma if levels is None else levels[0])
    beside, weight = stack_references(state, batch), stack_masks(state, batch)
    route = draw_route(state.config, len(state.family.blocks(state.transformer)), x_sigma, weight, micro, patch)
    weight = weight if route is None else loss_weight_of_kept(route, x_sigma, weight, patch)
    rolled = None if levels is None else x0
    class_text = _class_text(state, batch, prompts) if state.config.preservation else ()
    return Batch(
        x_sigma, velocity, sigma, text, beside, weight, prior, levels, rolled, route=route,
        factor=loss_factors(state.config, batch, sigma, state.family.loss_weight(state.transformer, sigma)),
        class_text=class_text,
    )  # fmt: skip


def draw_samples(
    config: TrainingConfig, samples: Sequence[Sample], plan: BatchPlan, parts: Sequence[FolderConfig], micro: int
) -> list[Sample]:
    """Return the samples of micro-batch number `micro`, those mirrored that `flip` of their folder picks."""
    batch = [samples[i] for i in plan.batch(micro)]
    if not any(part.flip for part in parts):
        return batch
    return [
        replace(sample, is_mirrored=True) if _is_mirrored(config, parts[sample.part].flip, sample, micro, i) else sample
        for i, sample in enumerate(batch)
    ]


def _is_mirrored(config: TrainingConfig, share: float, sample: Sample, micro: int, position: int) -> bool:
    rng = generator(config.seed, "flip", micro, position, sample.key)
    return torch.rand((), generator=rng, dtype=torch.float64).item() < share


def loss_factors(
    config: TrainingConfig, batch: Sequence[Sample], sigma: Tensor, of_family: Tensor | None = None
) -> Tensor | None:
    """Return the factor of each sample's loss, (B,), by its row of a table and its noise level; None where all are 1.

    Args:
        of_family: Family.loss_weight at these noise levels.
    """
    is_weighted = any(sample.loss_weight != 1.0 for sample in batch)
    if not is_weighted and config.loss_weighting == "none":
        return of_family
    factors = torch.tensor([sample.loss_weight for sample in batch]) * sigma_weight(config.loss_weighting, sigma)
    return factors if of_family is None else factors * of_family


def _class_text(state: TrainState, batch: Sequence[Sample], prompts: Sequence[str]) -> list[Tensor]:
    """Return the embeddings of the captions with the class word in place of the trigger."""
    parts = [state.parts[sample.part] for sample in batch]
    return [
        state.text.get(class_caption(prompt, part.trigger, part.class_word))
        for prompt, part in zip(prompts, parts, strict=True)
    ]


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
