"""The CDF and quantile of the Beta distribution, for scalars, without scipy."""

from __future__ import annotations

import math

MAX_TERMS = 500
TINY = 1e-300
MAX_STEPS = 1100  # enough halvings to get from 1 to the smallest fp64
PRECISION = 2e-16


def cdf(x: float, a: float, b: float) -> float:
    """Return I_x(a, b), the share of Beta(a, b) at or below x.

    I_x(a, b) = x^a (1 - x)^b / (a B(a, b)) * 1 / (1 + d1 / (1 + d2 / (1 + ...)))

    for x below (a + 1) / (a + b + 2), else 1 - I_{1-x}(b, a). Source: DLMF 8.17.22, evaluated by Lentz's method.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - cdf(1 - x, b, a)
    return pdf(x, a, b) * x * (1 - x) / a * _fraction(x, a, b)


def pdf(x: float, a: float, b: float) -> float:
    """Return x^(a - 1) (1 - x)^(b - 1) / B(a, b), for x in (0, 1)."""
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp((a - 1) * math.log(x) + (b - 1) * math.log1p(-x) - log_beta)


def _fraction(x: float, a: float, b: float) -> float:
    """Return the continued fraction 1 / (1 + d1 / (1 + d2 / ...)).

    d_2m = m (b - m) x / ((a + 2m - 1)(a + 2m)),   d_2m+1 = -(a + m)(a + b + m) x / ((a + 2m)(a + 2m + 1))
    """
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
    """Return x with I_x(a, b) = p, for p in [0, 1], to the last bits.

    Newton's method, with bisection to stay within bounds.
    """
    if p <= 0 or p >= 1:
        return float(p >= 1)
    if a == b and p >= 0.5:  # use the other half, where x is small and floats are dense
        return 0.5 if p == 0.5 else 1 - quantile(1 - p, a, b)
    low, high, x = 0.0, 1.0, 0.5
    for _ in range(MAX_STEPS):
        error = cdf(x, a, b) - p
        low, high = (low, x) if error > 0 else (x, high)
        newton = x - error / pdf(x, a, b)
        following = newton if low < newton < high else (low + high) / 2
        if abs(following - x) <= PRECISION * x or following == 0:
            return following
        x = following
    return x
