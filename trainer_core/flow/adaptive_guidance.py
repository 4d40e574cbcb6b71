"""Classifier-free guidance that stops paying for the negative prompt once it no longer matters. Tensors only.

Source: Castillo et al. 2023, arXiv:2312.12487 (adaptive guidance).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAME_LEVEL = 1e-6  # relative; fp32 levels may have gone through another dtype's arithmetic

Predict = Callable[[bool], tuple[Tensor, Tensor | None]]
Combine = Callable[[Tensor, Tensor, float], Tensor]


def guide(cond: Tensor, uncond: Tensor, cfg: float) -> Tensor:
    """denoised = u + cfg (c - u),   c and u the denoised latents with the positive and the negative prompt.

    Source: Ho and Salimans 2022, arXiv:2207.12598.
    """
    return uncond + (cond - uncond) * cfg


def similarity(cond: Tensor, uncond: Tensor) -> float:
    """Cosine between the two, over the whole flattened batch, in fp32."""
    return float(torch.nn.functional.cosine_similarity(cond.float().flatten(), uncond.float().flatten(), dim=0))


def stretch(cond: Tensor, scale: float) -> Tensor:
    """Guidance from the positive pass alone: the negative one is taken to be flat, the mean of c.

    denoised = m + scale / sqrt(d) (c - m),   m and d the mean and the standard deviation of each sample of c

    The deviation of the result is scale sqrt(d), so a picture that has become strong already is not made stronger.
    """
    dims = tuple(range(1, cond.ndim))
    mean, deviation = cond.mean(dims, keepdim=True), cond.std(dims, keepdim=True)
    return mean + scale / deviation.sqrt() * (cond - mean)


@dataclass(frozen=True, kw_only=True)
class AdaptiveGuidance:
    """When both prompts run, and when the positive one alone.

    Args:
        cfg: strength while both run; 1 never runs the negative prompt.
        threshold: cosine similarity of the two denoised latents; once it is reached, later steps run the positive
            prompt alone. 1 or more: never.
        uncond_zero_scale: 0 to 2; strength of `stretch` in those later steps. 0: the positive prompt as it is.
        cfg_start_pct: share of the run, in noise levels, before which the positive prompt runs alone. In [0, 1].
        initial_disabled_steps: so many first steps run the positive prompt alone. Steps, not evaluations of the model.
    """

    cfg: float = 3.0
    threshold: float = 0.990
    uncond_zero_scale: float = 0.0
    cfg_start_pct: float = 0.0
    initial_disabled_steps: int = 0

    def start(self, sigmas: Sequence[float], start_sigma: float = math.inf, *, corrects: bool = False) -> GuidanceRun:
        """A fresh run; nothing is carried over from an earlier one.

        Args:
            sigmas: noise levels, falling, the last one (0) included.
            start_sigma: the level of cfg_start_pct: shift_sigma(1 - pct), or ComfyUI's percent_to_sigma(pct).
            corrects: the sampler is known to evaluate each level for the step before first, as Heun's method does.
                Without that it is noticed after the first step.
        """
        return GuidanceRun(self, sigmas, start_sigma if self.cfg_start_pct > 0 else math.inf, corrects)


class GuidanceRun:
    """What one run has seen so far. `both`, `alone`: evaluations with and without the negative prompt."""

    def __init__(self, settings: AdaptiveGuidance, sigmas: Sequence[float], start_sigma: float, corrects: bool = False):
        self.settings, self.sigmas, self.start_sigma = settings, tuple(map(float, sigmas)), start_sigma
        self.settled_step: int | None = None  # the step at which the threshold was reached
        self.both = self.alone = 0
        self._seen: set[int] = set()
        self._returns = corrects

    @property
    def share_skipped(self) -> float:
        """Share of the negative prompt's evaluations that were saved."""
        return self.alone / max(1, self.alone + self.both)

    def denoise(self, sigma: float, predict: Predict, combine: Combine = guide) -> Tensor:
        """The guided denoised latents of one evaluation.

        Args:
            sigma: noise level of the evaluation.
            predict: takes whether the negative prompt is wanted, gives the denoised latents (c, u), u None where not.
            combine: (c, u, cfg) -> the guided denoised latents.
        """
        step, settings = self._step(sigma), self.settings
        settled = self.settled_step is not None and step > self.settled_step
        early = step < settings.initial_disabled_steps or sigma > self.start_sigma
        if settled or early or math.isclose(settings.cfg, 1.0):
            self.alone += 1
            cond, _ = predict(False)
            return stretch(cond, settings.uncond_zero_scale) if settled and settings.uncond_zero_scale > 0 else cond
        self.both += 1
        cond, uncond = predict(True)
        assert uncond is not None
        if settings.threshold < 1 and self.settled_step is None and similarity(cond, uncond) >= settings.threshold:
            self.settled_step = step  # this step keeps CFG; later ones go without
        return combine(cond, uncond, settings.cfg)

    def _step(self, sigma: float) -> int:
        """The step this evaluation belongs to: the last one whose level is not below sigma.

        Heun's method evaluates at the next step's level to correct the present step, then comes back to it. Once a
        level has been visited twice, the first visit of each later level is known to be such a correction.
        """
        above = sum(s > sigma * (1 - SAME_LEVEL) for s in self.sigmas[:-1])  # levels at or above this one
        level = max(0, above - 1)
        exact = math.isclose(self.sigmas[level], sigma, rel_tol=SAME_LEVEL)
        first = level not in self._seen
        self._returns |= exact and not first
        if exact:
            self._seen.add(level)
        return level - 1 if exact and first and self._returns and level > 0 else level
