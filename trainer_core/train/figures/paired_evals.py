"""Compare evaluations item by item: what was learned, whether the run overfits, and whether it still gets better.

Every evaluation measures the same images with the same noise at the same sigmas. So two evaluations are compared by the
difference of each image's loss, whose spread is far smaller than that of the losses:

    d_i = L_i(t) - L_i(r),   change = mean d_i,   standard error = stdev d_i / sqrt(n)

The gap is what the trained images have improved by more than the held-out ones, since an earlier evaluation r:

    gap = mean over held-out images of (L_i(t) - L_i(r)) - mean over trained images of (L_j(t) - L_j(r))

The earlier loss is subtracted because the two sets of images differ. r is the evaluation with the lowest held-out loss.
At the lowest itself it is the start, where the error is large: images differ in what the base model knows of them (on
chroma-nano 0.20 +- 0.18 since the start, and 0.048 +- 0.015 since the lowest). Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ...config.training import MIN_HELD_OUT
from ...validation.scores.estimates import Estimate, estimate

Losses = Mapping[str, Sequence[float]]  # key of an image -> its loss at each of EVAL_SIGMAS

Z = 1.6448536269514722  # 95 % quantile of the normal distribution
SLOPE_EVALS = 5  # newest evaluations whose slope decides about overfitting
CONFIRMATIONS = 2  # evaluations in a row that must show it


@dataclass(frozen=True)
class Evaluation:
    """The losses of one evaluation.

    Attributes:
        judged: of the images that judge the run: the held-out ones, or the trained ones where none are held out.
        trained: of trained images, beside held-out ones; else empty.
    """

    judged: Losses
    trained: Losses = field(default_factory=dict)

    @property
    def loss(self) -> Estimate:
        """The mean loss of the judged images, and its standard error over them (0 for one image)."""
        return estimate([fmean(losses) for losses in self.judged.values()])

    def as_json(self) -> dict[str, Any]:
        """Return JSON values, with None for a loss that is not finite."""
        groups = {"judged": self.judged, "trained": self.trained}
        return {
            name: {key: [value if math.isfinite(value) else None for value in values] for key, values in losses.items()}
            for name, losses in groups.items()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Evaluation:
        groups = (value["judged"], value["trained"])
        return cls(*({key: [math.nan if v is None else v for v in row] for key, row in g.items()} for g in groups))


def t_quantile(freedom: int) -> float:
    """Return the 95 % quantile of Student's t distribution with 2 or more degrees of freedom.

    The expansion 26.7.5 of Abramowitz and Stegun; below 1 % off from 3 degrees on, and 2.6 % too low for 2.
    """
    z, v = Z, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v**power for power, term in enumerate(terms, 1))


def change(new: Losses, old: Losses, sigma: int | None = None) -> Estimate | None:
    """Return the mean difference of the losses of the same images, and its standard error. None without such images.

    Args:
        sigma: index of one of EVAL_SIGMAS; None: the mean over all.
    """
    differences = [_at(new[key], sigma) - _at(old[key], sigma) for key in new if key in old]
    return estimate(differences) if differences else None


def _at(losses: Sequence[float], sigma: int | None) -> float:
    return fmean(losses) if sigma is None else losses[sigma]


def gap(new: Evaluation, old: Evaluation, sigma: int | None = None) -> Estimate | None:
    """Return how much more the trained images have improved than the held-out ones, and its standard error."""
    judged, trained = change(new.judged, old.judged, sigma), change(new.trained, old.trained, sigma)
    if not judged or not trained:
        return None
    return judged[0] - trained[0], math.hypot(judged[1], trained[1])


def slope(evaluations: Mapping[int, Evaluation]) -> Estimate | None:
    """Return the slope of the judged images' loss, per evaluation, and its standard error.

    The error has two parts: that of the images, each of which has a slope of its own, and that of the evaluations,
    which scatter around the line because the weights do.
    """
    series = [evaluation.judged for _, evaluation in sorted(evaluations.items())]
    keys = [key for key in series[0] if all(key in losses for losses in series)] if len(series) > 2 else []
    if len(keys) < 2:
        return None
    times = [index - (len(series) - 1) / 2 for index in range(len(series))]
    square = sum(time * time for time in times)
    means = [[fmean(losses[key]) for losses in series] for key in keys]
    of_images = estimate([sum(t * value for t, value in zip(times, row, strict=True)) / square for row in means])
    curve = [fmean(column) for column in zip(*means, strict=True)]
    rest = [value - fmean(curve) - of_images[0] * time for time, value in zip(times, curve, strict=True)]
    of_evaluations = math.sqrt(sum(value * value for value in rest) / (len(series) - 2) / square)
    return of_images[0], math.hypot(of_images[1], of_evaluations)


def overfits(evaluations: Mapping[int, Evaluation]) -> bool:
    """Return whether the run overfits: its newest CONFIRMATIONS evaluations all show it.

    An evaluation shows it if the trained images have improved by more than the held-out ones since the lowest held-out
    loss, and the held-out loss rises over the last SLOPE_EVALS evaluations, both with 95 % certainty. How often good
    runs raise a false alarm: tests/train/test_paired_evals.py.
    """
    steps = sorted(evaluations)
    newest = [steps[: len(steps) - back] for back in range(CONFIRMATIONS)]
    return all(_shows_overfitting({step: evaluations[step] for step in part}) for part in newest)


def _shows_overfitting(evaluations: Mapping[int, Evaluation]) -> bool:
    steps = sorted(evaluations)
    if len(steps) <= SLOPE_EVALS:  # the start is none of them: the first steps change the loss most
        return False
    newest = evaluations[steps[-1]]
    count = min(len(newest.judged), len(newest.trained))
    last = slope({step: evaluations[step] for step in steps[-SLOPE_EVALS:]})
    apart = gap(newest, evaluations[best_step(evaluations)])
    if count < MIN_HELD_OUT or last is None or apart is None:
        return False
    return lower_bound(apart, count - 1) > 0 and lower_bound(last, min(count - 1, SLOPE_EVALS - 2)) > 0


def lower_bound(value: Estimate, freedom: int) -> float:
    """Return the value that the truth is above with 95 % certainty."""
    return value[0] - t_quantile(freedom) * value[1]


def is_no_longer_better(evaluations: Mapping[int, Evaluation], patience: int) -> bool:
    """Return whether the loss of the judged images has stopped falling.

    It has if none of the last `patience` evaluations is the lowest so far, and if on average they are no lower than as
    many before them. The second condition is for runs that still learn, by less than single evaluations scatter.
    """
    curve = _curve(evaluations)
    steps = sorted(curve)
    before, last = steps[:-patience][-patience:], steps[-patience:]
    if not before or best_step(evaluations) in last:
        return False
    return fmean(curve[step] for step in last) >= fmean(curve[step] for step in before)


def best_step(evaluations: Mapping[int, Evaluation]) -> int:
    """Return the step of the lowest loss of the judged images."""
    curve = _curve(evaluations)
    return min(curve, key=lambda step: (curve[step], step), default=min(evaluations))


def _curve(evaluations: Mapping[int, Evaluation]) -> dict[int, float]:
    """Return the loss of the judged images at each step, less that of the same images at the start."""
    start = evaluations[min(evaluations)]
    changes = {step: change(evaluation.judged, start.judged) for step, evaluation in evaluations.items()}
    return {step: value[0] for step, value in changes.items() if value and math.isfinite(value[0])}


@dataclass(frozen=True)
class Verdict:
    """What the evaluations up to a step say.

    Attributes:
        best: step of the lowest loss of the judged images so far.
        change: of their loss since then, and its standard error.
        improvement: of the judged images' loss since the start, and its standard error; negative: lower.
        trained: mean loss of the trained images; None where none are measured beside held-out ones.
        gap_since: step that the gap is counted from: the best one, or the start where this is the best.
        gap: how much more the trained images have improved than the held-out ones, and its standard error; or None.
        gaps: the same at each of EVAL_SIGMAS.
        waiting: evaluations since the best one.
        overfits: whether the run overfits.
    """

    best: int
    change: Estimate
    improvement: Estimate
    trained: float | None
    gap_since: int
    gap: Estimate | None
    gaps: tuple[Estimate, ...]
    waiting: int
    overfits: bool


def verdict(evaluations: Mapping[int, Evaluation], step: int) -> Verdict | None:
    """Return what the evaluations up to `step` say; None where there is nothing to compare with."""
    past = {at: evaluation for at, evaluation in evaluations.items() if at <= step}
    if len(past) < 2 or step not in past:
        return None
    newest, start, best = past[step], past[min(past)], best_step(past)
    since, improvement = change(newest.judged, past[best].judged), change(newest.judged, start.judged)
    gap_since = min(past) if best == step else best
    if since is None or improvement is None:  # eval_images was changed, and no image is in both
        return None
    num_sigmas = len(next(iter(newest.judged.values())))
    trained = fmean(map(fmean, newest.trained.values())) if newest.trained else None
    gaps = [gap(newest, past[gap_since], sigma) for sigma in range(num_sigmas)]
    return Verdict(
        best, since, improvement, trained, gap_since, gap(newest, past[gap_since]), tuple(v for v in gaps if v),
        sum(at > best for at in past), overfits(past),
    )  # fmt: skip
