"""The algorithm: batch -> sigma -> x_sigma -> predict -> loss -> backward -> step -> hooks.

    x_sigma = (1 - sigma) x0 + sigma noise,   loss = mean |v_theta(x_sigma, sigma, text) - (noise - x0)|^2

All that is random in step k is drawn from generators seeded by (run seed, purpose, micro-batch, sample), never from a global state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...adapters.inject import set_micro_, set_strength_
from ...config.optimizer import OptimizerConfig
from ...config.training import TrainingConfig
from ...data.batch_sampler import BatchPlan
from ...data.cache.latents import LatentCache
from ...data.cache.masks import MaskWeights
from ...data.cache.prompts import TextCache
from ...data.dataset import Sample
from ...data.reference_images import ReferenceLatents
from ...flow.loss import velocity_loss
from ...flow.path import interpolate
from ...flow.sigma_density import Density
from ...host import Host, Notice, StepReport
from ...models.family import Family
from ...optim.lr_schedule import rate_of
from ...optim.optimizer import set_rate_, shown_rate
from ...seeds import generator
from .nan_guard import refuse_or_skip, told_of_skipped
from .prefetch import Ahead, Batch, reading_ahead
from .scheduled_sampling import drawn_levels, rolled_out
from .token_drop import drawn_route, weight_of_kept

if TYPE_CHECKING:
    from .oom_recovery import Relief


@dataclass
class Run:
    """What a step needs, ready in memory. losses and step grow as the run goes on; the rest stays."""

    config: TrainingConfig
    family: Family
    transformer: nn.Module
    layers: dict[str, Any]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    density: Density
    samples: Sequence[Sample]
    plan: BatchPlan
    latents: LatentCache
    text: TextCache
    device: torch.device
    num_steps: int
    dtype: str = "fp32"  # that the model computes in, as in ModelConfig
    attention: str = "native"  # the kernel that computes it, see attention.py
    optimizer_config: OptimizerConfig = field(default_factory=OptimizerConfig)
    step: int = 0
    held: Sequence[Sample] = ()  # kept out of training: their loss picks the best checkpoint
    references: ReferenceLatents | None = None  # pictures to start from
    masks: MaskWeights | None = None
    prior_parts: frozenset[int] = frozenset()  # of the dataset: what is trained towards the base's own prediction
    relief: Relief | None = None  # where the plan chose to store activations: what to do if that was too much
    ahead: Ahead | None = None  # makes the next micro-batch meanwhile, where fit() finds that worth a thread
    ema: Any = None  # lora.ema.Ema, where the run keeps an average of its weights
    losses: list[float] = field(default_factory=list)  # NaN: the step was skipped
    eval_losses: dict[int, tuple[float, float]] = field(default_factory=dict)  # step -> mean, standard error
    learning_rates: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)  # of each step since this start


Hook = Callable[[Run], None]


def fit(run: Run, host: Host, hooks: Sequence[Hook] = ()) -> None:
    """Train from run.step to run.num_steps; every hook is called after every step.

    Raises:
        Cancelled (or the host's own interrupt): between two steps, so that run is whole.
        UserError: the loss or the gradient is not finite; the weights are those of the step before.
    """
    with reading_ahead(run, lambda micro: micro_batch(run, micro)):
        while run.step < run.num_steps:
            host.check_cancelled()
            began = time.perf_counter()
            rate = rate_of(run.step, run.config, run.optimizer_config, run.num_steps)
            loss, norm = train_step(run, rate)
            run.step += 1
            run.losses.append(loss)
            rate = shown_rate(run.optimizer, rate)
            run.learning_rates.append(rate)
            run.step_seconds.append(time.perf_counter() - began)
            if math.isfinite(loss):
                host.emit(StepReport(run.step, run.num_steps, loss, rate, norm, run.step_seconds[-1]))
            else:
                host.emit(Notice(told_of_skipped(run), "warning"))
            for hook in hooks:
                hook(run)


def train_step(run: Run, learning_rate: float) -> tuple[float, float]:
    """One optimiser step over `accumulation` micro-batches. Returns the mean loss and the gradient's norm before clipping."""
    set_rate_(run.optimizer, learning_rate)
    first = run.step * run.config.accumulation
    total = _accumulated(run, first)
    limit = run.config.max_grad_norm or math.inf
    norm = nn.utils.clip_grad_norm_(run.parameters, limit)
    loss_value, norm_value = torch.stack([total, norm.to(total)]).tolist()  # the step's only wait for the device
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        refuse_or_skip(run, first, loss_value, norm_value)
        run.optimizer.zero_grad(set_to_none=True)
        return math.nan, math.nan
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.update_(run.layers)
    return loss_value, norm_value


def _accumulated(run: Run, first: int) -> Tensor:
    """Add up the gradients of a step's micro-batches, the first of them number `first`; returns the mean loss, on the device."""
    while True:
        try:
            total, loss = torch.zeros((), device=run.device), None
            for micro in range(first, first + run.config.accumulation):
                set_micro_(run.layers, micro)
                loss = micro_loss(run, micro) / run.config.accumulation
                loss.backward()
                total += loss.detach()
            return total
        except Exception as error:
            if run.relief is None or not run.relief.helps(error):
                raise
        finally:
            set_micro_(run.layers, None)
        run.optimizer.zero_grad(set_to_none=True)
        loss = None  # where the backward pass broke off it holds all that was stored
        run.relief.take_()


def micro_loss(run: Run, micro: int) -> Tensor:
    """Mean loss of micro-batch number `micro`, counted from the run's beginning."""
    batch = (run.ahead.get(micro) if run.ahead else micro_batch(run, micro)).to(run.device)
    if batch.levels is not None:
        batch = rolled_out(run, batch)
    target = batch.velocity if batch.prior is None else with_prior(run, batch)
    prediction = run.family.predict(run.transformer, batch.x_sigma, batch.sigma, batch.text, route=batch.route, **batch.beside)
    if batch.share is not None:
        prediction = batch.share * prediction
    return velocity_loss(prediction, target, batch.weight).mean()


@torch.no_grad()
def with_prior(run: Run, batch: Batch) -> Tensor:
    """The path's velocity, and in its place the base's own prediction for samples that keep the model as it is: (B, C, h, w).

    Ruiz et al. 2022, arXiv:2208.12242 draw pictures with the base and train on those; its prediction for the very input says the same
    without sampling, at every noise level. On the batch's route: an update of 0 is to have nothing to correct.
    """
    assert batch.prior is not None
    set_strength_(run.transformer, 0.0)
    try:
        base = run.family.predict(run.transformer, batch.x_sigma, batch.sigma, batch.text, route=batch.route, **batch.beside)
    finally:
        set_strength_(run.transformer, 1.0)
    return torch.where(batch.prior[:, None, None, None], base.to(batch.velocity), batch.velocity)


def micro_batch(run: Run, micro: int) -> Batch:
    """What micro-batch number `micro` trains on, on the CPU: latents and text as they are cached, all else drawn for it."""
    batch = [run.samples[i] for i in run.plan.batch(micro)]
    x0 = torch.stack([run.latents.get(sample) for sample in batch])
    noise = torch.stack([
        torch.randn(x0.shape[1:], generator=generator(run.config.seed, "noise", micro, place, sample.key))
        for place, sample in enumerate(batch)
    ])  # fmt: skip
    sigma = run.density.at(x0[0, 0].numel()).sample(len(batch), generator(run.config.seed, "sigma", micro))
    text = [run.text.get(prompt_of(run.config, sample, micro, place)) for place, sample in enumerate(batch)]
    is_prior = [sample.part in run.prior_parts for sample in batch]
    prior = torch.tensor(is_prior) if any(is_prior) else None
    levels = drawn_levels(run.config, micro, sigma, prior)
    x_sigma, velocity = interpolate(x0, noise, sigma if levels is None else levels[0])
    beside, weight = beginnings(run, batch), place_weights(run, batch)
    route = drawn_route(run.config, len(run.family.blocks(run.transformer)), x_sigma, weight, micro)
    weight = weight if route is None else weight_of_kept(route, x_sigma, weight)
    rolled = None if levels is None else x0
    return Batch(x_sigma, velocity, sigma, text, beside, weight, prior, levels, rolled, route=route)


def place_weights(run: Run, batch: Sequence[Sample]) -> Tensor | None:
    """(B, 1, h, w): what each place of the batch's pictures counts, on the CPU. None where the run has no masks."""
    return None if run.masks is None else torch.stack([run.masks.get(sample) for sample in batch])


def beginnings(run: Run, batch: Sequence[Sample]) -> dict[str, Tensor]:
    """What the batch's pictures start from, on the CPU, for families that take references."""
    if run.references is None:
        return {}
    return {"reference": torch.stack([run.references.get(sample) for sample in batch])}


def prompt_of(config: TrainingConfig, sample: Sample, micro: int, place: int) -> str:
    """The caption of a sample in a micro-batch: one of its captions, or "" by caption dropout."""
    draw = generator(config.seed, "caption", micro, place, sample.key)
    if torch.rand((), generator=draw).item() < config.caption_dropout:
        return ""
    return sample.captions[int(torch.randint(len(sample.captions), (), generator=draw).item())]
