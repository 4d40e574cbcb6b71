"""Prodigy: AdamW that estimates its own learning rate from the distance that the weights have moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config.optimizer import OptimizerConfig
from .foreach import ExactOptimizer, Lot, each, gradients, of
from .optimizer import OptimizerPart, Params, as_list


class Prodigy(ExactOptimizer):
    """With the loop's learning rate gamma (1, times the schedule), initial weights x0 and b3 = sqrt(b2):

    m = b1 m + (1 - b1) d g,   v = b2 v + (1 - b2) d^2 g^2
    r = b3 r + (1 - b3) gamma d^2 <g, x0 - x>,   s = b3 s + (1 - b3) gamma d^2 g
    x -= gamma d (m / (sqrt(v) + d eps) + decay x)
    d = max(d, coef r / |s|_1), and at most growth x d

    <,> and |.|_1 are over all parameters together. d and r are scalars, stored in the first parameter's state. The
    state holds three tensors and the initial weights for each parameter.

    corrects_bias: gamma is multiplied by Adam's bias correction sqrt(1 - b2^k) / (1 - b1^k) of step k. Without it, m
    is large compared with sqrt(v) in the first 1,000 steps: 3.2 times in the first, 6.6 times in the 12th.
    safeguards: s = b3 s + (1 - b3) d^2 g, without gamma. r still has it, so that steps with a low rate, which move
    nothing and so say little of the distance, count less.

    Source: Mishchenko and Defazio 2023, arXiv:2306.06101, algorithm 4. The two switches are the authors'
    (use_bias_correction and safeguard_warmup of prodigyopt), who recommend both for diffusion models.
    """

    stored_name = "Prodigy"

    def __init__(self, params: list[Any], defaults: dict[str, Any], config: OptimizerConfig):
        super().__init__(params, defaults)
        self.d0, self.d_coef, self.growth = config.prodigy_d0, config.prodigy_d_coef, config.prodigy_growth or math.inf
        self.corrects_bias, self.safeguards = config.prodigy_bias_correction, config.prodigy_safeguard_warmup

    @property
    def rate_factor(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The current value of d."""
        return self._shared().get("d", self.d0)

    def _shared(self) -> dict[str, Any]:
        return self.state[self.param_groups[0]["params"][0]]

    def initial(self, param: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
        zeros = {name: torch.zeros_like(param) for name in ("m", "v", "s")}
        return {**zeros, "x0": param.detach().clone()}

    def lots(self):
        """Yield lots. The first parameter gets its state even without a gradient, since it holds the shared scalars."""
        first, shared = self.param_groups[0]["params"][0], self._shared()
        if not shared:
            shared.update(self.initial(first, self.param_groups[0]), d=self.d0, r=0.0)
            if self.corrects_bias:
                shared["k"] = 0
        return super().lots()

    def _rate(self, group: Mapping[str, Any]) -> float:
        """Return gamma for a group in this step."""
        if not self.corrects_bias:
            return group["lr"]
        (beta1, beta2), k = group["betas"], self._shared()["k"]
        return group["lr"] * math.sqrt(1 - beta2**k) / (1 - beta1**k)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None, "closures are not used here"
        lots = list(self.lots())
        shared = self._shared()
        if self.corrects_bias:
            shared["k"] += 1
        d, beta3 = shared["d"], math.sqrt(self.param_groups[0]["betas"][1])
        gain = sum(self._gather_(params, group, d) for group, params in lots)
        shared["r"] = beta3 * shared["r"] + (1 - beta3) * gain
        for group, params in lots:
            self.move_(params, [], [self.state[param] for param in params], group)
        size = _total(each.norm([state["s"] for state in self.state.values()], 1))
        if size > 0:
            shared["d"] = max(d, min(self.d_coef * shared["r"] / size, self.growth * d))

    def _gather_(self, params: Lot, group: Mapping[str, Any], d: float) -> float:
        """Update m, v and s of a lot. Return gamma d^2 <g, x0 - x>."""
        grads, states = gradients(params), [self.state[param] for param in params]
        (beta1, beta2), rate = group["betas"], self._rate(group)
        beta3 = math.sqrt(beta2)
        m, v, s = of(states, "m"), of(states, "v"), of(states, "s")
        each.mul_(m, beta1)
        each.add_(m, grads, alpha=(1 - beta1) * d)
        each.mul_(v, beta2)
        each.addcmul_(v, grads, grads, (1 - beta2) * d**2)
        each.mul_(s, beta3)
        each.add_(s, grads, alpha=(1 - beta3) * (1.0 if self.safeguards else rate) * d**2)
        distance = each.sub(of(states, "x0"), params)
        each.mul_(distance, grads)
        return rate * d**2 * _total([one.sum() for one in distance])

    def move_(self, params: Lot, grads: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any]) -> None:
        d = self._shared()["d"]
        size = each.sqrt(of(states, "v"))
        each.add_(size, d * group["eps"])
        update = each.div(of(states, "m"), size)
        each.add_(update, params, alpha=group["weight_decay"])
        each.add_(params, update, alpha=-self._rate(group) * d)


def _total(numbers: list[Tensor] | tuple[Tensor, ...]) -> float:
    # One device synchronization; the result does not depend on the order of the sum.
    return math.fsum(torch.stack(list(numbers)).tolist())


def build(params: Params, config: OptimizerConfig, learning_rate: float, weight_decay: float, seed: int = 0) -> Prodigy:
    """Build Prodigy with default betas (0.9, 0.999) and eps 1e-8."""
    settings = {"betas": (config.beta1 or 0.9, config.beta2 or 0.999), "eps": config.eps or 1e-8}
    defaults = {"lr": learning_rate, "weight_decay": weight_decay, **settings}
    return Prodigy(as_list(params), defaults, config)


PART = OptimizerPart(
    build=build,
    uses=frozenset({"beta1", "beta2", "eps"})
    | {field for field in OptimizerConfig.__dataclass_fields__ if field.startswith("prodigy_")},
    usual_rates=(0.3, 2.0),
)
