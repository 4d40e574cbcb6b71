"""The Beta distribution's CDF and quantile, for one number at a time, without scipy."""

from __future__ import annotations

import math

MAX_TERMS = 500
TINY = 1e-300
BISECTIONS = 1100  # enough to reach the smallest fp64 from 1; ends as soon as the interval can't be halved


def cdf(x: float, a: float, b: float) -> float:
    """I_x(a, b), the share of Beta(a, b) at or below x.

    I_x(a, b) = x^a (1 - x)^b / (a B(a, b)) * 1 / (1 + d1 / (1 + d2 / (1 + ...)))

    for x below (a + 1) / (a + b + 2), else 1 - I_{1-x}(b, a). Source: DLMF 8.17.22, evaluated by Lentz's method.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - cdf(1 - x, b, a)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / a * _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    """1 / (1 + d1 / (1 + d2 / ...)),   d_2m = m (b - m) x / ((a + 2m - 1)(a + 2m)),
    d_2m+1 = -(a + m)(a + b + m) x / ((a + 2m)(a + 2m + 1))"""
    c, d, value = 1.0, 0.0, 1.0
    for k in range(1, MAX_TERMS):
        m = k // 2
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        term = odd if k % 2 else m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + term * d or TINY)
        c = 1 + term / c or TINY
        value *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return 1 / value


def quantile(p: float, a: float, b: float) -> float:
    """x with I_x(a, b) = p, for p in [0, 1], to the last bit or two: bisection, which can't go astray."""
    if p <= 0 or p >= 1:
        return float(p >= 1)
    if a == b and p > 0.5:
        return 1 - quantile(1 - p, a, b)  # the symmetric half, where x is small and its spacing fine
    if a == b and p == 0.5:
        return 0.5
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if cdf(middle, a, b) < p else (low, middle)
    return (low + high) / 2
