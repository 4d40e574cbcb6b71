"""The leak of a LoRA: how far it moves predictions for prompts without its trigger, beside those with it.

For a prompt p, move(p) is the root mean square of the difference between the prediction with the LoRA and that of the
base model, for the same noisy latents. Over probes i, each with a prompt and the same prompt without the trigger:

    leak = mean move_i(without) / mean move_i(with)

0: the LoRA changes nothing without its trigger. 1: it changes as much without it. The standard error is that of a ratio
of means, from the residuals move_i(without) - leak * move_i(with). Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from ...config.training import LEAK_SIGMAS
from .paired_evals import Estimate

HIGH = 0.5  # leak from which the log says what helps


@dataclass(frozen=True)
class Leak:
    """The moves of one measurement.

    Attributes:
        sigmas: noise level of each probe.
        moved_with: move of each probe's prompt with the trigger.
        moved_without: move of the same prompt without it.
    """

    sigmas: Sequence[float]
    moved_with: Sequence[float]
    moved_without: Sequence[float]

    @property
    def ratio(self) -> Estimate | None:
        """The leak and its standard error; None where the LoRA moves nothing, or a value is not finite."""
        return ratio_of_means(self.moved_without, self.moved_with)

    @property
    def by_sigma(self) -> dict[float, float | None]:
        """The leak at each sigma."""
        values = {}
        for sigma in sorted(set(self.sigmas), reverse=True):
            at = [index for index, other in enumerate(self.sigmas) if other == sigma]
            pairs = [[moves[index] for index in at] for moves in (self.moved_without, self.moved_with)]
            estimate = ratio_of_means(*pairs)
            values[sigma] = estimate and estimate[0]
        return values

    def as_json(self) -> dict[str, Any]:
        """Return JSON values, with None for a value that is not finite."""
        moves = {"moved_with": self.moved_with, "moved_without": self.moved_without}
        finite = {name: [v if math.isfinite(v) else None for v in values] for name, values in moves.items()}
        return {"sigmas": list(self.sigmas), **finite}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Leak:
        moves = ([math.nan if v is None else v for v in value[name]] for name in ("moved_with", "moved_without"))
        return cls(value["sigmas"], *moves)


def ratio_of_means(above: Sequence[float], below: Sequence[float]) -> Estimate | None:
    """Return the ratio of the means of paired values, and its standard error (0 for one pair)."""
    if not above or not all(map(math.isfinite, [*above, *below])) or not fmean(below):
        return None
    ratio = fmean(above) / fmean(below)
    rest = [a - ratio * b for a, b in zip(above, below, strict=True)]
    return ratio, stdev(rest) / math.sqrt(len(rest)) / abs(fmean(below)) if len(rest) > 1 else 0.0


def report_of(leaks: Mapping[int, Leak]) -> list[dict[str, Any]]:
    """Return each measurement as JSON values for report.json."""
    return [{"step": step, **_entry(leak)} for step, leak in sorted(leaks.items())]


def _entry(leak: Leak) -> dict[str, Any]:
    mean, error = leak.ratio or (None, None)
    return {
        "leak": mean,
        "standard_error": error,
        "by_sigma": {f"{sigma:g}": value for sigma, value in leak.by_sigma.items()},
        "moved_with": finite_mean(leak.moved_with),
        "moved_without": finite_mean(leak.moved_without),
    }


def finite_mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None where it is not finite."""
    return fmean(values) if all(map(math.isfinite, values)) else None


def sigma_of_probe(number: int) -> float:
    """Return the noise level of a probe: each of LEAK_SIGMAS is used equally often."""
    return LEAK_SIGMAS[number % len(LEAK_SIGMAS)]
