"""The mean of independent values, with its standard error. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

Estimate = tuple[float, float]  # mean, and its standard error


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values, and its standard error (0 for one value)."""
    if not all(map(math.isfinite, values)):  # statistics fails on some
        return math.nan, math.nan
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
