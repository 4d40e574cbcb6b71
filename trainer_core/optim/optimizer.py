"""What an optimiser brings: one file with a PART and one registry line.

What it may ask of the loop is here as well: the rate of each group, the averaged weights, the rate that is shown.
All of its state lies in `optimizer.state`, by parameter, as tensors, ints and floats: a checkpoint saves that and nothing
else, so that a resumed run goes on to the same bits (exact.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters.layer import AdapterLayer
from ..config.optimizer import OptimizerConfig

# Parameters, or named groups: {"params": [...], "name": "...", "lr_scale": 0.5}.
Params = Iterable[nn.Parameter] | Iterable[Mapping[str, Any]]


class OptimizerAbilities:
    """What the trainer asks of an optimizer beside torch's own interface. The defaults suit one that does nothing special.

    Attributes:
        rate_factor: the learning rate that it found by itself, as a factor of the one it is given.
        planned_for: device type that memory is estimated for, where it holds no numbers (the meta device).
    """

    rate_factor: float = 1.0
    planned_for: str = ""

    def use_averages(self) -> AbstractContextManager[None]:
        """While it is open the parameters hold the weights to export; afterwards those of training, to the bit. May be nested."""
        return nullcontext()


def never_missing(device_type: str) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class OptimizerPart:
    """An optimiser that can be chosen.

    Args:
        build: build(params, config, learning_rate, weight_decay, seed) -> the optimiser. It may turn the parameters to
            another dtype in place (adamw_bf16 does). seed: the run's, for what it draws.
        uses: fields of OptimizerConfig that change what it does.
        usual_rates: lowest and highest learning rate in use for LoRAs; far outside of them a run warns.
        missing: missing(device type) -> "" where it can run, else what is missing and how to get it. Loads nothing heavy.
        extra: name of the optional extra that brings its package, "" for none.
        elementwise: no number depends on a sum over others, so that the number of threads changes no bit.
        averages: it averages its weights in place of a falling schedule; see `evaluating`.
    """

    build: Callable[[Params, OptimizerConfig, float, float, int], torch.optim.Optimizer]
    uses: frozenset[str]
    usual_rates: tuple[float, float]
    missing: Callable[[str], str] = never_missing
    extra: str = ""
    elementwise: bool = False
    averages: bool = False


def as_list(params: Params) -> list[Any]:
    """The parameters or groups as a list; nothing to train is our fault."""
    found = list(params)
    assert found, "nothing to train"
    return found


def flat(params: Params) -> list[nn.Parameter]:
    """Every parameter, in the order in which an optimiser counts them."""
    return [p for item in as_list(params) for p in (item["params"] if isinstance(item, Mapping) else [item])]


def set_rate_(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step: rate x lr_scale for each group, where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def effective_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """The rate that the chart shows: for one that finds its own, rate x what it found."""
    return rate * able(optimizer).rate_factor


def evaluating(optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    """While it is open the parameters hold the weights to export and to validate; afterwards those of training, to the bit.

    The two differ for optimisers that average; for all others nothing happens. May be nested.
    """
    return able(optimizer).use_averages()


def able(optimizer: torch.optim.Optimizer) -> OptimizerAbilities:
    """The same optimizer, as one that an OptimizerPart built."""
    assert isinstance(optimizer, OptimizerAbilities), f"{type(optimizer).__name__} was built by no OptimizerPart"
    return optimizer


def parameter_groups(
    layers: Mapping[str, AdapterLayer], rates: Mapping[str, float]
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """What the optimiser takes: the parameters, or groups of one `lr_scale` each where factors differ from 1."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, layer in layers.items():
        groups.setdefault(rates.get(name, 1.0), []).extend(parameter for _, parameter in layer.trainable())
    if groups.keys() == {1.0}:
        return groups[1.0]
    return [{"params": found, "lr_scale": factor, "name": f"x {factor:g}"} for factor, found in groups.items()]
