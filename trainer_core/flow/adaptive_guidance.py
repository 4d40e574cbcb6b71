"""Classifier-free guidance that stops evaluating the negative prompt once it no longer matters. Works on tensors only.

Source: Castillo et al. 2023, arXiv:2312.12487 (adaptive guidance).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAME_LEVEL = 1e-6  # relative tolerance; fp32 sigmas may have been converted from another dtype

Predict = Callable[[bool], tuple[Tensor, Tensor | None]]
Combine = Callable[[Tensor, Tensor, float], Tensor]


def guide(cond: Tensor, uncond: Tensor, cfg: float) -> Tensor:
    """denoised = u + cfg (c - u),   c and u the denoised latents with the positive and the negative prompt.

    Source: Ho and Salimans 2022, arXiv:2207.12598.
    """
    return uncond + (cond - uncond) * cfg


def similarity(cond: Tensor, uncond: Tensor) -> float:
    """Return the cosine similarity of the two, over the whole flattened batch, in fp32."""
    return float(torch.nn.functional.cosine_similarity(cond.float().flatten(), uncond.float().flatten(), dim=0))


def stretch(cond: Tensor, scale: float) -> Tensor:
    """Return guidance from the positive prompt alone. The negative prediction is assumed to be flat, the mean of c.

    denoised = m + scale / sqrt(d) (c - m),   m and d the mean and the standard deviation of each sample of c

    The standard deviation of the result is scale sqrt(d), so that an image that already has high contrast is not
    amplified.
    """
    dims = tuple(range(1, cond.ndim))
    mean, deviation = cond.mean(dims, keepdim=True), cond.std(dims, keepdim=True)
    return mean + scale / deviation.sqrt() * (cond - mean)


@dataclass(frozen=True, kw_only=True)
class AdaptiveGuidance:
    """When both prompts are evaluated, and when only the positive one is.

    Attributes:
        cfg: CFG scale while both are evaluated; at 1 the negative prompt is never evaluated.
        threshold: Cosine similarity of the two denoised latents. Once it is reached, later steps evaluate only the
            positive
            prompt. 1 or more: never.
        uncond_zero_scale: 0 to 2; strength of `stretch` in those later steps. 0: use the positive prediction as it is.
        cfg_start_pct: Share of the sigma schedule before which only the positive prompt is evaluated. In [0, 1].
        initial_disabled_steps: Number of first steps that evaluate only the positive prompt. Steps, not model
            evaluations.
    """

    cfg: float = 3.0
    threshold: float = 0.990
    uncond_zero_scale: float = 0.0
    cfg_start_pct: float = 0.0
    initial_disabled_steps: int = 0

    def start(self, sigmas: Sequence[float], start_sigma: float = math.inf, *, corrects: bool = False) -> GuidanceRun:
        """Start a new run, without state from earlier ones.

        Args:
            sigmas: Falling sigmas, including the last one (0).
            start_sigma: Sigma of cfg_start_pct: shift_sigma(1 - pct), or ComfyUI's percent_to_sigma(pct).
            corrects: Whether the sampler evaluates each sigma first for the previous step, like Heun's method. If
                False,
                this is detected after the first step.
        """
        return GuidanceRun(self, sigmas, start_sigma if self.cfg_start_pct > 0 else math.inf, corrects)


class GuidanceRun:
    """State of one run.

    Attributes:
        settled_step: Step at which the threshold was reached; None before that.
        both: Number of evaluations with the negative prompt.
        alone: Number of evaluations without it.
    """

    def __init__(self, settings: AdaptiveGuidance, sigmas: Sequence[float], start_sigma: float, corrects: bool = False):
        self.settings, self.sigmas, self.start_sigma = settings, tuple(map(float, sigmas)), start_sigma
        self.settled_step: int | None = None
        self.both = self.alone = 0
        self._visited: set[int] = set()
        self._returns = corrects

    @property
    def share_skipped(self) -> float:
        """Share of the negative prompt's evaluations that were skipped."""
        return self.alone / max(1, self.alone + self.both)

    def denoise(self, sigma: float, predict: Predict, combine: Combine = guide) -> Tensor:
        """Return the guided denoised latents of one evaluation.

        Args:
            sigma: Sigma of the evaluation.
            predict: Takes whether the negative prompt is needed; returns the denoised latents (c, u), with u None if
                not.
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
            self.settled_step = step  # this step still uses CFG; later ones do not
        return combine(cond, uncond, settings.cfg)

    def _step(self, sigma: float) -> int:
        """Return the step that this evaluation belongs to: the last one whose sigma is not below the given one.

        Heun's method evaluates at the next step's sigma to correct the current step, then evaluates there again. Once a
        sigma
        has been visited twice, the first visit of each later sigma is known to be such a correction.
        """
        above = sum(s > sigma * (1 - SAME_LEVEL) for s in self.sigmas[:-1])  # sigmas at or above this one
        level = max(0, above - 1)
        exact = math.isclose(self.sigmas[level], sigma, rel_tol=SAME_LEVEL)
        first = level not in self._visited
        self._returns |= exact and not first
        if exact:
            self._visited.add(level)
        return level - 1 if exact and first and self._returns and level > 0 else level
