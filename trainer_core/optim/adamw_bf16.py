"""AdamW with weights and states in bf16: half the memory, without rounding bias."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config.optimizer import OptimizerConfig
from ..seeds import generator
from .foreach import ExactOptimizer, Lot, count_, each, of
from .optimizer import OptimizerPart, Params, Slice, as_list, flat

LOW_BITS = 16  # of a float32 that a bfloat16 does not have
# Elements processed at once. On a CPU, 2.4 M take 115 ms in one piece, and 45 ms in pieces that fit its caches.
LOT_NUMBERS = {"cpu": 1 << 18}
GPU_LOT_NUMBERS = 1 << 22  # about 45 temporary bytes each: 0.2 GB; with 1 << 24 they would use up what bf16 saves


def round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to bfloat16 stochastically, up or down at random, so that the mean is the value.

    The low 16 bits of the value are its distance from the bf16 below, in 65536ths. A uniform 16-bit number added to
    them carries into the remaining bits with exactly that probability. Infinity and NaN are preserved.

    Args:
        value: The values, float32.
        noise: int32, uniform in [0, 65536), with the value's shape.
    """
    bits = (noise + value.view(torch.int32)).bitwise_and_(-1 << LOW_BITS)
    return bits.view(torch.float32).bfloat16()


class AdamWBf16(ExactOptimizer):
    """AdamW's formula in fp32, with weights and states stored in bf16:

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    w -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)

    With rounding to the nearest bf16, a step of less than 1/512 of a weight would be lost, and v with b2 = 0.999 could
    never shrink. So w, m and v are rounded stochastically (round_stochastically). With kahan the weight is w + c
    instead, where w is rounded to the nearest bf16 and c is a second bf16 for the remainder, rounded stochastically: 16
    of the 24 significant bits of fp32. Weights that stay in fp32 (row norms of a DoRA), and their states, are not
    rounded.

    The random numbers are a function of (seed, step, index of the parameter) and are generated on the parameter's
    device: generating 60 M of them on the CPU would take longer than the step.

    Source: Zamirai et al. 2020, arXiv:2010.06192 (stochastic rounding and Kahan summation in bf16).
    """

    stored_name = "AdamWBf16"
    rounds_weights = True

    def __init__(self, params: list[Any], defaults: dict[str, Any], seed: int):
        super().__init__(params, defaults)
        self.seed = seed
        self._places = {param: i for i, param in enumerate(p for g in self.param_groups for p in g["params"])}

    @contextmanager
    def standing_in(self, copy: nn.Parameter, parameter: nn.Parameter) -> Iterator[None]:
        self._places[copy] = self._places[parameter]
        try:
            yield
        finally:
            del self._places[copy]

    def initial(self, param: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
        rest = {"c": torch.zeros_like(param)} if group["kahan"] else {}
        return {"step": 0, "m": torch.zeros_like(param), "v": torch.zeros_like(param), **rest}

    def move_(self, params: Lot, grads: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any]) -> None:
        step, limit = count_(states), LOT_NUMBERS.get(self.planned_for or params[0].device.type, GPU_LOT_NUMBERS)
        for lot in _split_lots(params, limit):
            self._move_lot_(params[lot], grads[lot], states[lot], group, step)

    def _move_lot_(
        self, params: Lot, grads: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any], step: int
    ):
        (beta1, beta2), rate = group["betas"], group["lr"]
        # One flat fp32 tensor each, so that the number of calls does not depend on the number of parameters.
        g, w, m, v = _flatten(grads), _flatten(params), _flatten(of(states, "m")), _flatten(of(states, "v"))
        if group["kahan"]:
            w += _flatten(of(states, "c"))
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        w.mul_(1 - rate * group["weight_decay"])
        size = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        w.addcdiv_(m, size, value=-rate / (1 - beta1**step))
        noise = torch.cat([self._noise(param, step) for param in params], dim=1)
        _store_(of(states, "m"), m, noise[0])
        _store_(of(states, "v"), v, noise[1])
        if group["kahan"]:
            nearest = w.to(params[0].dtype)
            _store_(of(states, "c"), w - nearest.float(), noise[2])
            _unflatten_(params, nearest)
        else:
            _store_(params, w, noise[2])

    def _noise(self, param: nn.Parameter, step: int) -> Tensor:
        """Return int32 noise in [0, 65536), (3, elements), for m, v and w or c. Each random int64 gives four values."""
        source = generator(self.seed, "rounding", step, self._places[param], device=param.device)
        part = self.slices.get(param, Slice(param.numel(), 0))
        words = torch.empty(-(-3 * part.numel // 4), dtype=torch.int64, device=param.device)
        words.random_(-(2**63), None, generator=source)
        halves = words.view(torch.int16)[: 3 * part.numel].view(3, -1)[:, part.start : part.start + param.numel()]
        return halves.to(torch.int32).bitwise_and_((1 << LOW_BITS) - 1)


def _split_lots(params: Lot, limit: int) -> Iterator[slice]:
    """Yield slices of adjacent parameters with at most `limit` elements in total, or of a single parameter."""
    begin, num_elements = 0, 0
    for i, param in enumerate(params):
        if num_elements and num_elements + param.numel() > limit:
            yield slice(begin, i)
            begin, num_elements = i, 0
        num_elements += param.numel()
    yield slice(begin, len(params))


def _flatten(tensors: list[Any]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).float()


def _store_(targets: list[Any], values: Tensor, noise: Tensor) -> None:
    """Copy flat fp32 values into tensors, rounded where these are in bf16."""
    _unflatten_(targets, round_stochastically(values, noise) if targets[0].dtype == torch.bfloat16 else values)


def _unflatten_(targets: list[Any], flat_values: Tensor) -> None:
    parts = flat_values.split([target.numel() for target in targets])
    each.copy_(targets, [part.view_as(target) for part, target in zip(parts, targets, strict=True)])


def build(
    params: Params, config: OptimizerConfig, learning_rate: float, weight_decay: float, seed: int = 0
) -> AdamWBf16:
    """Build AdamWBf16 and convert the parameters to bf16. Default betas (0.9, 0.999), eps 1e-8."""
    groups = as_list(params)
    for param in flat(groups):
        param.data = param.data.bfloat16()
    settings = {"betas": (config.beta1 or 0.9, config.beta2 or 0.999), "eps": config.eps or 1e-8, "kahan": config.kahan}
    return AdamWBf16(groups, {"lr": learning_rate, "weight_decay": weight_decay, **settings}, seed)


PART = OptimizerPart(
    build=build, uses=frozenset({"beta1", "beta2", "eps", "kahan"}), usual_rates=(1e-5, 1e-3), elementwise=True
)
