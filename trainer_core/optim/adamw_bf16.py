"""AdamW with weights and states in bf16: half of the memory, and no bias from rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config.optimizer import OptimizerConfig
from ..seeds import generator
from .foreach import ExactOptimizer, Lot, count_, each, of
from .optimizer import OptimizerPart, Params, as_list, flat

LOW_BITS = 16  # of a float32 that a bfloat16 does not have
# Numbers that are worked on at once. On a CPU, 2.4 M in one piece take 115 ms, and 45 ms in pieces that fit its caches.
LOT_NUMBERS = {"cpu": 1 << 18}
GPU_LOT_NUMBERS = 1 << 22  # some 45 bytes each for a moment: 0.2 GB, where 1 << 24 would undo what bf16 saves


def round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down at random, so that the mean is the value.

    The low 16 bits of the value are its distance from the bf16 below, in 65536ths: added to a uniform number of 16 bits
    they carry into the bits that stay with just that probability. Infinite stays infinite, and NaN NaN.

    Args:
        noise: int32, uniform in [0, 65536), of the value's shape.
    """
    bits = (noise + value.view(torch.int32)).bitwise_and_(-1 << LOW_BITS)
    return bits.view(torch.float32).bfloat16()


class AdamWBf16(ExactOptimizer):
    """AdamW's formula in fp32 on weights and states that are stored in bf16:

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    w -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)

    Rounded to the nearest bf16, a step of less than 1/512 of a weight would be lost, and v with b2 = 0.999 could never
    shrink; so w, m and v are rounded at random (`rounded`). With kahan the weight is w + c instead, where c is a second
    bf16 for what the nearest bf16 leaves over, rounded at random too: 16 bits of the 24 that fp32 has.

    Randomness comes from (seed, step, place of the parameter), on the parameter's device: 60 M draws a step on the CPU
    would take longer than the step.

    Source: Zamirai et al. 2020, arXiv:2010.06192 (stochastic rounding and Kahan summation in bf16).
    """

    def __init__(self, params: list[Any], defaults: dict[str, Any], seed: int):
        super().__init__(params, defaults)
        self.seed = seed
        self._places = {param: i for i, param in enumerate(p for g in self.param_groups for p in g["params"])}

    def initial(self, param: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
        rest = {"c": torch.zeros_like(param)} if group["kahan"] else {}
        return {"step": 0, "m": torch.zeros_like(param), "v": torch.zeros_like(param), **rest}

    def move_(self, params: Lot, grads: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any]) -> None:
        step, limit = count_(states), LOT_NUMBERS.get(self.planned_for or params[0].device.type, GPU_LOT_NUMBERS)
        for part in _parts(params, limit):
            self._move_part_(params[part], grads[part], states[part], group, step)

    def _move_part_(
        self, params: Lot, grads: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any], step: int
    ):
        (beta1, beta2), rate = group["betas"], group["lr"]
        # One flat fp32 tensor of each: few calls however many parameters there are.
        g, w, m, v = _flat(grads), _flat(params), _flat(of(states, "m")), _flat(of(states, "v"))
        if group["kahan"]:
            w += _flat(of(states, "c"))
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        w.mul_(1 - rate * group["weight_decay"])
        size = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        w.addcdiv_(m, size, value=-rate / (1 - beta1**step))
        noise = torch.cat([self._noise(param, step) for param in params], dim=1)
        _spread_(of(states, "m"), round_stochastically(m, noise[0]))
        _spread_(of(states, "v"), round_stochastically(v, noise[1]))
        if group["kahan"]:
            nearest = w.bfloat16()
            _spread_(of(states, "c"), round_stochastically(w - nearest.float(), noise[2]))
            _spread_(params, nearest)
        else:
            _spread_(params, round_stochastically(w, noise[2]))

    def _noise(self, param: nn.Parameter, step: int) -> Tensor:
        """(3, its numbers), int32 in [0, 65536): for m, v and w or c. Four of them from each 64 bits drawn."""
        draw = generator(self.seed, "rounding", step, self._places[param], device=param.device)
        words = torch.empty(-(-3 * param.numel() // 4), dtype=torch.int64, device=param.device)
        words.random_(-(2**63), None, generator=draw)
        halves = words.view(torch.int16)[: 3 * param.numel()].view(3, -1)
        return halves.to(torch.int32).bitwise_and_((1 << LOW_BITS) - 1)


def _parts(params: Lot, limit: int) -> Iterator[slice]:
    """Slices of neighbours of at most `limit` numbers together, or of one parameter."""
    begin, numbers = 0, 0
    for i, param in enumerate(params):
        if numbers and numbers + param.numel() > limit:
            yield slice(begin, i)
            begin, numbers = i, 0
        numbers += param.numel()
    yield slice(begin, len(params))


def _flat(tensors: list[Any]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).float()


def _spread_(targets: list[Any], flat_values: Tensor) -> None:
    parts = flat_values.split([target.numel() for target in targets])
    each.copy_(targets, [part.view_as(target) for part, target in zip(parts, targets, strict=True)])


def build(
    params: Params, config: OptimizerConfig, learning_rate: float, weight_decay: float, seed: int = 0
) -> AdamWBf16:
    """Turns the parameters to bf16. Betas (0.9, 0.999), eps 1e-8."""
    groups = as_list(params)
    for param in flat(groups):
        param.data = param.data.bfloat16()
    numbers = {"betas": (config.beta1 or 0.9, config.beta2 or 0.999), "eps": config.eps or 1e-8, "kahan": config.kahan}
    return AdamWBf16(groups, {"lr": learning_rate, "weight_decay": weight_decay, **numbers}, seed)


PART = OptimizerPart(
    build=build, uses=frozenset({"beta1", "beta2", "eps", "kahan"}), usual_rates=(1e-5, 1e-3), elementwise=True
)
