"""Measure at each checkpoint how far the LoRA moves predictions without its trigger (see train/figures/leak.py).

LEAK_PROBES captions with the trigger are taken, and the same without it. Both are predicted for latents as they are
while the base model samples an image for the caption without the trigger: from noise, down to one of LEAK_SIGMAS. There
the prompt decides what the image becomes. Noisy training images would not do: they show the style already, and the LoRA
changes their predictions as much for any prompt (docs/decisions/0075).

The base model samples and predicts once, at the start of the process. A measurement takes 2 forward passes for each
probe, 16 in all. Noise and captions do not depend on the run's seed, so that runs can be compared; and nothing that the
training reads is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...config.dataset import FolderConfig
from ...config.request import TrainRequest
from ...config.training import LEAK_PROBES, LEAK_SIGMAS
from ...data.captions import without_trigger
from ...data.dataset import Index
from ...data.holdout import split
from ...data.sample_table import Sample, columns
from ...host import Host, LeakMeasured, Notice, PhaseProgress, PhaseStarted
from ...seeds import generator
from ..figures.leak import HIGH, Leak, finite_mean, sigma_of_probe
from ..step.batch import stack_references
from ..step.preservation import base_model
from ..step.state import TrainState
from .eval_loss import EVALUATION_SEED
from .eval_weights import final_weights


@dataclass(frozen=True)
class Probe:
    """A caption with the trigger and the same without it, at a noise level, for latents of its image's size."""

    sample: Sample
    sigma: float
    prompts: tuple[str, str]


def find_probes(request: TrainRequest, index: Index) -> tuple[Probe, ...]:
    """Return the probes of a run: of held-out images with a trigger, or of trained ones where none are held out.

    There are none where no caption has a trigger, and where `eval_images` is 0.
    """
    if not request.training.eval_images:
        return ()
    for samples in reversed(split(index.samples, request.training.holdout)):  # the held-out ones first
        pairs = [*_captioned(samples, request.dataset.parts)]
        if pairs:
            picked = [pairs[number * len(pairs) // LEAK_PROBES] for number in range(LEAK_PROBES)]
            return tuple(
                Probe(sample, sigma_of_probe(number), prompts) for number, (sample, prompts) in enumerate(picked)
            )
    return ()


def _captioned(samples: Sequence[Sample], parts: Sequence[FolderConfig]) -> list[tuple[Sample, tuple[str, str]]]:
    """Return at most LEAK_PROBES samples with a trigger, spread evenly, with their caption with and without it."""
    triggered = [i for i, part in enumerate(parts) if part.trigger.strip() and not part.prior_preservation]
    indices = np.flatnonzero(np.isin(columns(samples)["part"], triggered)) if len(samples) else np.zeros(0, np.int64)
    count = min(LEAK_PROBES, len(indices))
    found = []
    for number in range(count):
        sample = samples[int(indices[number * len(indices) // count])]
        caption, part = sample.captions[0], parts[sample.part]
        plain = without_trigger(caption, part.trigger, part.class_word)
        if plain != caption:
            found.append((sample, (caption, plain)))
    return found


def describe_missing(request: TrainRequest) -> str:
    """Return why a run has no probes; "" where it is no surprise."""
    if not request.training.eval_images:
        return ""
    return "leak is not measured: no trigger is set in the dataset, or no caption has it (docs/learned.md)"


class LeakMeter:
    """Measures the leak of a run.

    Attributes:
        probes: what is measured; () for nothing.
        starts: noisy latents of each probe, (1, channels, h, w), on the CPU; each rank has those of its own probes.
        base: predictions of the base model for them, with and without the trigger.
    """

    def __init__(self, probes: Sequence[Probe]):
        self.probes = probes
        self.starts: dict[int, Tensor] = {}
        self.base: dict[int, tuple[Tensor, Tensor]] = {}

    def measure_base_(self, state: TrainState, host: Host) -> None:
        """Sample with the base model, and predict with it."""
        if not self.probes:
            return

        def keep(number: int) -> list[float]:
            start = self.starts[number] = _sample_down(state, self.probes[number], number)
            first, second = _predictions(state, self.probes[number], start)
            self.base[number] = first.cpu(), second.cpu()
            return []

        with base_model(state):
            self._for_each(state, host, keep, is_cancelable=True)

    def measure(self, state: TrainState, host: Host) -> Leak:
        """Return the moves of all probes, with the weights for export."""
        assert self.probes

        def moves(number: int) -> list[float]:
            predictions = _predictions(state, self.probes[number], self.starts[number])
            pairs = zip(predictions, self.base[number], strict=True)
            return torch.stack([(new - old.to(new)).square().mean().sqrt() for new, old in pairs]).tolist()

        with final_weights(state):
            values = self._for_each(state, host, moves)
        moved_with, moved_without = zip(*values, strict=True)
        return Leak([probe.sigma for probe in self.probes], moved_with, moved_without)

    @torch.no_grad()
    def _for_each(
        self, state: TrainState, host: Host, compute: Callable[[int], list[float]], is_cancelable: bool = False
    ) -> list[list[float]]:
        """Return what `compute` returns for each probe.

        Args:
            is_cancelable: False at a checkpoint: whoever stops the run there gets the same checkpoint as who does not.
        """
        count = len(self.probes)
        host.emit(PhaseStarted("leak", count, "prompts"))

        def compute_one(number: int) -> list[float]:
            if is_cancelable:
                state.check_cancelled(host)
            values = compute(number)
            done = number - state.forward_ranks.rank + state.forward_ranks.size
            host.emit(PhaseProgress("leak", min(done, count), count))
            return values

        return state.share_out(count, compute_one)


def _sample_down(state: TrainState, probe: Probe, number: int) -> Tensor:
    """Return the latents of an image that the model samples without the trigger, at the probe's noise level."""
    shape = (1, *state.latents.get(probe.sample).shape)
    x = torch.randn(shape, generator=generator(EVALUATION_SEED, "leak", number, probe.sample.key))
    levels = [sigma for sigma in LEAK_SIGMAS if sigma >= probe.sigma]
    for now, following in pairwise(levels):
        x = x + (following - now) * _predict(state, probe, x, now, probe.prompts[1]).cpu()
    return x


def _predictions(state: TrainState, probe: Probe, x_sigma: Tensor) -> list[Tensor]:
    return [_predict(state, probe, x_sigma, probe.sigma, prompt) for prompt in probe.prompts]


def _predict(state: TrainState, probe: Probe, x_sigma: Tensor, sigma: float, prompt: str) -> Tensor:
    beside: Mapping[str, Any] = {
        name: tensor.to(state.device) for name, tensor in stack_references(state, [probe.sample]).items()
    }
    return state.family.predict(
        state.transformer, x_sigma.to(state.device), torch.tensor([sigma], device=state.device),
        [state.text.get(prompt).to(state.device)], **beside,
    ).float()  # fmt: skip


def measure_leak(state: TrainState, host: Host) -> None:
    """Measure the leak of this step and report it, unless a checkpoint has done so."""
    meter = state.leak_meter
    if meter is None or not meter.probes or not state.step or state.step in state.leaks:
        return
    leak = state.leaks[state.step] = meter.measure(state, host)
    ratio = leak.ratio
    if ratio is None:
        return
    values = tuple(leak.by_sigma.values())
    event = LeakMeasured(
        state.step, *ratio, sigmas=tuple(leak.by_sigma), by_sigma=values,
        moved_with=finite_mean(leak.moved_with), moved_without=finite_mean(leak.moved_without),
    )  # fmt: skip
    host.emit(event)
    host.emit(Notice(f"step {state.step}: leak {ratio[0]:.2f} +- {ratio[1]:.2f} without the trigger"))
    earlier = [other.ratio for step, other in state.leaks.items() if step < state.step]
    if ratio[0] >= HIGH and not any(value and value[0] >= HIGH for value in earlier):
        host.emit(Notice(what_helps(state)))


def what_helps(state: TrainState) -> str:
    """Return the settings that lower the leak, of those that the run does not use."""
    ways = []
    if all(part.trigger.strip() for part in state.parts):
        ways.append("a folder of images without the trigger, best with prior_preservation")
    if not state.config.preservation:
        ways.append("preservation with a class_word")
    text = "the LoRA also changes images without its trigger"
    return f"{text}; what helps: {', or '.join(ways) or 'fewer steps'} (docs/learned.md)"
