"""Densities of sigma: how often each noise level is trained.

A density p(sigma) is defined on [0, 1], where 1 is pure noise. Samples are computed with the inverse of the CDF in
fp64, so that one uniform number gives the same sigma on every machine. They are returned in fp32 and stay fp32 until
they enter the model (bf16 changes sigma * 1000 by up to 3.95).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

AUTO_SHIFT_TOKENS = (256, 4096)  # diffusers' FlowMatchEulerDiscreteScheduler: base and max image sequence length
AUTO_SHIFT_MU = (0.5, 1.15)  # its base and max shift
SCHNELL_SIGMAS = (1.0,) * 7 + (0.75, 0.5, 0.25)  # the schedule of fast schnell training: each of the ten equally often
BISECTIONS = 60  # halves [0, 1] below the spacing of fp64


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """s' = a s / (1 + (a - 1) s): keeps 0 and 1, and moves values in between towards noise for a > 1.

    Its inverse is the shift by 1 / a.
    Source: Esser et al. 2024, arXiv:2403.03206, eq. 23.
    """
    return sigma if shift == 1 else shift * sigma / (1 + (shift - 1) * sigma)


def auto_shift(num_tokens: int) -> float:
    """a = e^mu, with mu linear in the number of image tokens: 0.5 at 256 (256 px), 1.15 at 4096 (1024 px).

    Source: Flux's own sampling code, and diffusers' `calculate_shift`.
    """
    (low, high), (mu_low, mu_high) = AUTO_SHIFT_TOKENS, AUTO_SHIFT_MU
    return math.exp(mu_low + (mu_high - mu_low) * (num_tokens - low) / (high - low))


class Density(ABC):
    """p(sigma) on [0, 1].

    Attributes:
        warning: What the user should know before training with it; usually "".
    """

    warning = ""

    @abstractmethod
    def pdf(self, sigma: Tensor) -> Tensor:
        """Return p(sigma), for sigma in [0, 1]; may be infinite at 0 and 1."""

    @abstractmethod
    def cdf(self, sigma: Tensor) -> Tensor:
        """Return the share of samples at or below sigma, for sigma in [0, 1]."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Return the inverse of the CDF, for u in [0, 1]."""

    def at(self, num_tokens: int) -> Density:
        """Return the density for images of this many tokens, which is the same for all by default."""
        return self

    def sample(self, n: int, generator: Generator) -> Tensor:
        """Return n independent samples in [0, 1], fp32, (n,), on the generator's device."""
        u = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
        return self.quantile(u).float()


class Uniform(Density):
    """p(s) = 1. Source: Liu et al. 2022, arXiv:2209.03003."""

    def pdf(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def cdf(self, sigma: Tensor) -> Tensor:
        return sigma

    def quantile(self, u: Tensor) -> Tensor:
        return u


class Chroma(Density):
    """p(s) = (2 - 7.7 (s - 1/2)^2) / Z,   Z = 2 - 7.7 / 12 = 1.3583;   positive on all of [0, 1] (0.055 at its ends).

    CDF(s) = (2 s - 7.7/3 ((s - 1/2)^3 + 1/8)) / Z. Its inverse is the middle root of a cubic: with
    y = s - 1/2, y^3 - 3 r^2 y + q = 0, r^2 = 2 / 7.7, q = 3 Z (u - 1/2) / 7.7, and y = 2 r sin(t) turns it into
    sin(3 t) = q / (2 r^3).

    Source: the training code of Chroma (lodestone-rock/flow).
    """

    PEAK, CURVE = 2.0, 7.7
    Z = PEAK - CURVE / 12

    def pdf(self, sigma: Tensor) -> Tensor:
        return (self.PEAK - self.CURVE * (sigma - 0.5).square()) / self.Z

    def cdf(self, sigma: Tensor) -> Tensor:
        return (self.PEAK * sigma - self.CURVE / 3 * ((sigma - 0.5) ** 3 + 1 / 8)) / self.Z

    def quantile(self, u: Tensor) -> Tensor:
        r = math.sqrt(self.PEAK / self.CURVE)
        q = 3 * self.Z * (u - 0.5) / self.CURVE
        return (0.5 + 2 * r * torch.sin(torch.asin(q / (2 * r**3)) / 3)).clamp(0, 1)


class LogitNormal(Density):
    """logit(s) = ln(s / (1 - s)) ~ Normal(mean, deviation^2);   s in (0, 1), p -> 0 at both ends.

    p(s) = exp(-(logit(s) - m)^2 / (2 d^2)) / (d sqrt(2 pi) s (1 - s)),   CDF(s) = Phi((logit(s) - m) / d)

    `sigmoid` with a scale is the same family, s = sigmoid(scale * normal): mean 0, deviation = scale.
    Source: Esser et al. 2024, arXiv:2403.03206, eq. 19 (rf/lognorm(0, 1), their best).
    """

    def __init__(self, mean: float = 0.0, deviation: float = 1.0):
        assert deviation > 0
        self.mean, self.deviation = mean, deviation

    def pdf(self, sigma: Tensor) -> Tensor:
        z = (torch.logit(sigma) - self.mean) / self.deviation
        p = torch.exp(-z.square() / 2) / (self.deviation * math.sqrt(2 * math.pi) * sigma * (1 - sigma))
        return torch.where((sigma <= 0) | (sigma >= 1), torch.zeros_like(p), p)

    def cdf(self, sigma: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(sigma) - self.mean) / self.deviation)

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.deviation * torch.special.ndtri(u))


class Beta22(Density):
    """p(s) = 6 s (1 - s): Beta(2, 2), the parameters that trainers use;   0 at both ends.

    CDF(s) = 3 s^2 - 2 s^3,   inverse: 1/2 - sin(asin(1 - 2 u) / 3).
    Source: SimpleTuner's flow_use_beta_schedule, whose alpha and beta are 2.
    """

    def pdf(self, sigma: Tensor) -> Tensor:
        return 6 * sigma * (1 - sigma)

    def cdf(self, sigma: Tensor) -> Tensor:
        return sigma.square() * (3 - 2 * sigma)

    def quantile(self, u: Tensor) -> Tensor:
        return (0.5 - torch.sin(torch.asin(1 - 2 * u) / 3)).clamp(0, 1)


class Mode(Density):
    """Concentrated in the middle, but positive at both ends. It is defined by its quantile.

    Q(u) = u + m (u - sin^2(pi u / 2)),   CDF = Q^-1 (by bisection: Q rises for -1 <= m <= 2 / (pi - 2)),
    p(s) = 1 / Q'(CDF(s)),   Q'(u) = 1 + m (1 - pi/2 sin(pi u)).
    m = 1.29: p is 0.437 at both ends and 3.80 in the middle.
    Source: Esser et al. 2024, arXiv:2403.03206, eq. 20 with u for their 1 - u; m is their choice.
    """

    def __init__(self, scale: float = 1.29):
        assert -1 <= scale <= 2 / (math.pi - 2)
        self.scale = scale

    def pdf(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * self.cdf(sigma))))

    def cdf(self, sigma: Tensor) -> Tensor:
        low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            below = self.quantile(middle) < sigma
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def quantile(self, u: Tensor) -> Tensor:
        return u + self.scale * (u - torch.sin(math.pi / 2 * u).square())


class CosMap(Density):
    """The cosine schedule of DDPMs, mapped to the straight path:   p(s) = 2 / (pi - 2 pi s + 2 pi s^2).

    CDF(s) = 2/pi atan(s / (1 - s)),   inverse: sin(pi u / 2) / (sin(pi u / 2) + cos(pi u / 2)).
    p is 2/pi at both ends, 4/pi in the middle.
    Source: Esser et al. 2024, arXiv:2403.03206, eq. 21.
    """

    def pdf(self, sigma: Tensor) -> Tensor:
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))

    def cdf(self, sigma: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan2(sigma, 1 - sigma)

    def quantile(self, u: Tensor) -> Tensor:
        sine, cosine = torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u)
        return sine / (sine + cosine)


class QuadraticTail(Density):
    """Samples both tails more often, on all of [0, 1]:   s = 2 u^2 for u < 1/2, else 1 - 2 (1 - u)^2, u uniform.

    p(s) = 1 / (2 sqrt(2 s)) for s <= 1/2, else 1 / (2 sqrt(2 (1 - s)));   0.5 in the middle, rising without bound (but
    with a finite integral) towards 0 and 1.
    CDF(s) = sqrt(s / 2) for s <= 1/2, else 1 - sqrt((1 - s) / 2).

    It is the remap of `quadratic_tail_legacy` with its two halves scaled so that they meet at 1/2.
    """

    def pdf(self, sigma: Tensor) -> Tensor:
        return 1 / (2 * (2 * torch.minimum(sigma, 1 - sigma)).sqrt())

    def cdf(self, sigma: Tensor) -> Tensor:
        return torch.where(sigma <= 0.5, (sigma / 2).sqrt(), 1 - ((1 - sigma) / 2).sqrt())

    def quantile(self, u: Tensor) -> Tensor:
        return torch.where(u < 0.5, 2 * u.square(), 1 - 2 * (1 - u).square())


class QuadraticTailLegacy(Density):
    """s = u^2 for u < 1/2, else 1 - (1 - u)^2, u uniform, exactly as described. It jumps from 1/4 to 3/4.

    p(s) = 1 / (2 sqrt(s)) on [0, 1/4), 0 on [1/4, 3/4), 1 / (2 sqrt(1 - s)) on [3/4, 1].
    CDF(s) = sqrt(s), then 1/2, then 1 - sqrt(1 - s).
    Source: the remap described for Chroma in SimpleTuner.
    """

    warning = (
        "quadratic_tail_legacy never trains sigma in [0.25, 0.75), where the shapes of an image are decided; "
        "quadratic_tail samples the tails as often without that gap."
    )

    def pdf(self, sigma: Tensor) -> Tensor:
        tail = 1 / (2 * torch.minimum(sigma, 1 - sigma).sqrt())
        return torch.where((sigma >= 0.25) & (sigma < 0.75), torch.zeros_like(tail), tail)

    def cdf(self, sigma: Tensor) -> Tensor:
        upper = torch.where(sigma < 0.75, torch.full_like(sigma, 0.5), 1 - (1 - sigma).sqrt())
        return torch.where(sigma < 0.25, sigma.sqrt(), upper)

    def quantile(self, u: Tensor) -> Tensor:
        return torch.where(u < 0.5, u.square(), 1 - (1 - u).square())


class Shifted(Density):
    """A density after s' = shift_sigma(s, a).

    CDF'(s') = CDF(s),   p'(s') = p(s) ds/ds',   ds/ds' = a / (a - (a - 1) s')^2,   s = shift_sigma(s', 1 / a)
    """

    def __init__(self, inner: Density, shift: float):
        assert shift > 0
        self.inner, self.shift, self.warning = inner, shift, inner.warning

    def pdf(self, sigma: Tensor) -> Tensor:
        slope = self.shift / (self.shift - (self.shift - 1) * sigma).square()
        return self.inner.pdf(self._unshift(sigma)) * slope

    def cdf(self, sigma: Tensor) -> Tensor:
        return self.inner.cdf(self._unshift(sigma))

    def quantile(self, u: Tensor) -> Tensor:
        return shift_sigma(self.inner.quantile(u), self.shift).clamp(0, 1)

    def _unshift(self, sigma: Tensor) -> Tensor:
        return shift_sigma(sigma, 1 / self.shift).clamp(0, 1)  # rounding may exceed 1


class ShiftedBySize(Shifted):
    """A density shifted by auto_shift of the image's tokens (16 x 16 pixels each), as Flux was trained.

    The object itself is the density for 1024 px; `at` returns that of another size.
    """

    def __init__(self, inner: Density):
        super().__init__(inner, auto_shift(AUTO_SHIFT_TOKENS[1]))

    def at(self, num_tokens: int) -> Shifted:
        return Shifted(self.inner, auto_shift(num_tokens))


class Listed(Density):
    """Only these sigmas, each as often as it is listed. It has no pdf, because all of the mass is at single points."""

    def __init__(self, sigmas: Sequence[float]):
        assert sigmas and all(0 <= sigma <= 1 for sigma in sigmas)
        self.sigmas = tuple(sorted(sigmas))

    def pdf(self, sigma: Tensor) -> Tensor:
        raise NotImplementedError("a list of sigmas has no pdf; use cdf")

    def cdf(self, sigma: Tensor) -> Tensor:
        levels = torch.tensor(self.sigmas, dtype=sigma.dtype, device=sigma.device)
        return torch.searchsorted(levels, sigma.contiguous(), right=True).to(sigma.dtype) / len(levels)

    def quantile(self, u: Tensor) -> Tensor:
        levels = torch.tensor(self.sigmas, dtype=u.dtype, device=u.device)
        return levels[(u * len(levels)).long().clamp(max=len(levels) - 1)]


DENSITIES: dict[str, Density] = {
    "chroma": Chroma(),
    "uniform": Uniform(),
    "logit-normal": LogitNormal(0.0, 1.0),
    "sigmoid": LogitNormal(0.0, 1.0),  # sigmoid(scale * normal) at scale 1
    "beta": Beta22(),
    "mode": Mode(1.29),
    "cosmap": CosMap(),
    "quadratic_tail": QuadraticTail(),
    "quadratic_tail_legacy": QuadraticTailLegacy(),
}


# Not among the user's choices: a model selects them itself.
LISTED: dict[str, Density] = {"schnell": Listed(SCHNELL_SIGMAS)}


def density(name: str, shift: float = 1.0) -> Density:
    """Return the density of this name, shifted if shift is not 1.

    Args:
        name: One of config.training.SIGMA_DENSITIES or LISTED.
        shift: Factor of `shift_sigma`; 0 shifts by the size of each image.
    """
    densities = {**DENSITIES, **LISTED}
    assert name in densities, f"there is no density named {name!r}"
    if shift == 0:
        return ShiftedBySize(densities[name])
    return densities[name] if shift == 1 else Shifted(densities[name], shift)
