"""Eval loss: the loss on fixed samples, fixed noise and fixed sigmas, comparable between steps and runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from ...adapters.inject import set_strength_
from ...config.training import EVAL_SIGMAS
from ...data.sample_table import Chosen, Sample, columns
from ...flow.loss import velocity_loss
from ...flow.path import interpolate
from ...host import EvalCompared, EvalReport, Host, Notice, PhaseProgress, PhaseStarted
from ...seeds import generator
from ..figures.paired_evals import Evaluation, Verdict, overfits, verdict
from ..step.batch import stack_masks, stack_references
from ..step.state import TrainState
from .eval_weights import final_weights

Eval = tuple[float, float]  # mean loss, and its standard error
EVALUATION_SEED = 0  # fixed: the eval loss must not depend on the run's seed


def eval_loss(state: TrainState, host: Host) -> Eval:
    """Return the mean velocity loss and its standard error over the samples (0 for one sample), see `measure`."""
    return measure(state, host).loss


def measure(state: TrainState, host: Host) -> Evaluation:
    """Return the velocity loss of each sample at each of EVAL_SIGMAS.

    It is measured on at most `eval_images` samples with their first caption, spread evenly over the held-out samples,
    or over all samples where none are held out. Beside held-out samples, as many trained ones are measured too. The
    weights are those for export, see final_weights.

    Args:
        host: receives progress.
    Raises:
        Cancelled: between two samples.
    """
    count, prior = state.config.eval_images, state.prior_parts
    judged = spread(without_prior(state.held or state.samples, prior), count)
    trained = spread(without_prior(state.samples, prior), count) if state.held else []
    with final_weights(state):
        losses = _eval_losses(state, host, [*judged, *trained])
    values = [*zip((sample.key for sample in (*judged, *trained)), losses, strict=True)]
    return Evaluation(dict(values[: len(judged)]), dict(values[len(judged) :]))


def evaluate(state: TrainState, host: Host) -> Eval | None:
    """Measure the loss and report it, unless a checkpoint has done so. None where `eval_images` is 0."""
    if not state.config.eval_images or state.step in state.eval_losses:
        return state.eval_losses.get(state.step)
    evaluation = state.evaluations[state.step] = measure(state, host)
    report(state, evaluation, host)
    return evaluation.loss


def report(state: TrainState, evaluation: Evaluation, host: Host) -> Verdict | None:
    """Report the evaluation of this step, and what it says beside the earlier ones. Return that, see verdict."""
    host.emit(EvalReport(state.step, *evaluation.loss, held_out=bool(state.held)))
    result = verdict(state.evaluations, state.step)
    if result is None:
        return None
    host.emit(
        EvalCompared(
            state.step, result.best, *result.change, trained=result.trained, sigmas=EVAL_SIGMAS, gap_since=result.gap_since,
            gaps=tuple(value for value, _ in result.gaps), gap_errors=tuple(error for _, error in result.gaps),
            waiting=result.waiting, overfits=result.overfits,
        )
    )  # fmt: skip
    if result.overfits and not overfits({at: earlier for at, earlier in state.evaluations.items() if at < state.step}):
        host.emit(Notice(describe_overfitting(state.step, result.best), "warning"))
    return result


def describe_overfitting(step: int, best: int) -> str:
    return (
        f"step {step}: the run overfits. The loss of held-out images rises while that of the trained ones falls; it "
        f"was lowest at step {best}. Use an earlier checkpoint (NAME-best), a lower learning rate or rank, or more "
        "images"
    )


def evaluate_start(state: TrainState, host: Host, is_beside_base: bool) -> tuple[Eval | None, Eval | None]:
    """Measure the loss of what the run starts from, and report it. Measure the base model for the leak.

    Args:
        is_beside_base: whether that is another model than the base: a LoRA file, say. Then the base is measured too.
    Returns:
        The start's loss and standard error, and the base's; None where they are not measured.
    """
    base = None
    set_strength_(state.transformer, 0.0)
    try:
        if state.leak_meter:
            state.leak_meter.measure_base_(state, host)
            set_strength_(state.transformer, 0.0)
        if not is_beside_base:
            return evaluate(state, host), None
        base = eval_loss(state, host) if state.config.eval_images else None
    finally:
        set_strength_(state.transformer, 1.0)
    return evaluate(state, host), base


@torch.no_grad()
def _eval_losses(state: TrainState, host: Host, samples: Sequence[Sample]) -> list[list[float]]:
    """Return the loss of each sample at each of EVAL_SIGMAS."""
    count = len(samples)
    host.emit(PhaseStarted("eval", count, "images"))

    def measure_one(number: int) -> list[float]:
        state.check_cancelled(host)
        losses = _losses_of(state, samples[number])
        done = number - state.forward_ranks.rank + state.forward_ranks.size
        host.emit(PhaseProgress("eval", min(done, count), count))
        return losses

    return state.share_out(count, measure_one)


def _losses_of(state: TrainState, sample: Sample) -> list[float]:
    """Return the loss of a sample at each of EVAL_SIGMAS."""
    x0 = state.latents.get(sample)[None].float()
    noise = torch.randn(x0.shape, generator=generator(EVALUATION_SEED, "evaluation", sample.key))
    text = state.text.get(sample.captions[0]).to(state.device)
    beside: dict[str, Any] = {
        name: tensor.to(state.device) for name, tensor in stack_references(state, [sample]).items()
    }
    weight = stack_masks(state, [sample])
    weight = None if weight is None else weight.to(state.device)
    values = []
    for value in EVAL_SIGMAS:
        sigma = torch.tensor([value])
        x_sigma, velocity = interpolate(x0, noise, sigma)
        prediction = state.family.predict(
            state.transformer, x_sigma.to(state.device), sigma.to(state.device), [text], **beside
        )
        values.append(velocity_loss(prediction, velocity.to(state.device), weight).mean())
    return torch.stack(values).tolist()  # one synchronization for all sigmas


def spread(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """Return at most `limit` samples, spread evenly."""
    count = min(limit, len(samples))
    return [samples[i * len(samples) // count] for i in range(count)]


def without_prior(samples: Sequence[Sample], prior_parts: Collection[int]) -> Sequence[Sample]:
    """Return the samples without those of these folders with prior preservation, unless there are no others."""
    if not prior_parts:
        return samples
    indices = np.flatnonzero(~np.isin(columns(samples)["part"], list(prior_parts)))
    return Chosen(samples, indices) if len(indices) else samples


def best_step(state: TrainState) -> int | None:
    """Return the step with the lowest loss on the held-out samples; None where it was never measured."""
    return min(state.eval_losses, key=lambda step: (state.eval_losses[step][0], step)) if state.eval_losses else None
