"""The interface of an optimizer: one file with a PART, and one line in the registry.

This module also holds what the training loop needs from an optimizer: the learning rate of each group, the averaged
weights, the logged learning rate. The whole state is in `optimizer.state`, per parameter, as tensors, ints and floats.
A checkpoint saves only that, and a resumed run continues bit for bit (foreach.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..adapters.layer import AdapterLayer
from ..config.optimizer import OptimizerConfig
from ..config.training import TrainingConfig

# Parameters, or named groups: {"params": [...], "name": "...", "lr_scale": 0.5}.
Params = Iterable[nn.Parameter] | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Slice:
    """Which part of a whole parameter a parameter is, in row-major order: that of one device (full_rank/sharding.py).

    Args:
        numel: Elements of the whole parameter.
        start: Index of the first element.
    """

    numel: int
    start: int


class OptimizerAbilities:
    """What the trainer needs from an optimizer besides torch's interface. The defaults suit an ordinary optimizer.

    Attributes:
        stored_name: Name of the kind of state in checkpoints. It stays when the class is renamed.
        rate_factor: For optimizers that find their own learning rate: its ratio to the given one.
        planned_for: Device type of the memory estimate, in which the parameters are on the meta device.
        rounds_weights: The optimizer itself computes in fp32 and rounds bf16 weights stochastically.
        slices: Parameters that are a slice of a larger one. Random numbers belong to the elements of the larger one.
    """

    stored_name: str
    rate_factor: float = 1.0
    planned_for: str = ""
    rounds_weights: bool = False
    slices: Mapping[nn.Parameter, Slice] = MappingProxyType({})

    def standing_in(self, copy: nn.Parameter, parameter: nn.Parameter) -> AbstractContextManager[None]:
        """Context manager in which a copy of a parameter is stepped in its place. The caller moves the state."""
        return nullcontext()

    def use_averages(self) -> AbstractContextManager[None]:
        """Context manager in which parameters hold the weights to export, then the trained ones again, bit for bit.

        May be nested.
        """
        return nullcontext()


def never_missing(device_type: str) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class OptimizerPart:
    """An optimizer that users can choose.

    Args:
        build: build(params, config, learning_rate, weight_decay, seed) -> the optimizer. It may convert the parameters
            to another dtype in place (adamw_bf16 does). seed: The run's seed, for random numbers.
        uses: Fields of OptimizerConfig that have an effect.
        usual_rates: Lowest and highest learning rate in common use for LoRAs. Far outside of them, a warning is logged.
        missing: missing(device type) -> "" if the optimizer can run, else what is missing and how to get it. Imports
            nothing heavy.
        extra: Name of the optional extra that installs its package, or "".
        elementwise: No element depends on a sum over others, so the number of threads does not change any bit.
        averages: Averages its weights instead of decaying the learning rate; see `evaluating`.
    """

    build: Callable[[Params, OptimizerConfig, float, float, int], torch.optim.Optimizer]
    uses: frozenset[str]
    usual_rates: tuple[float, float]
    missing: Callable[[str], str] = never_missing
    extra: str = ""
    elementwise: bool = False
    averages: bool = False


def as_list(params: Params) -> list[Any]:
    """Return the parameters or groups as a list. An empty list is a bug of the caller."""
    params_list = list(params)
    assert params_list, "nothing to train"
    return params_list


def flat(params: Params) -> list[nn.Parameter]:
    """Return every parameter in the order in which optimizers number them."""
    return [p for item in as_list(params) for p in (item["params"] if isinstance(item, Mapping) else [item])]


def set_rate_(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step: rate x lr_scale in groups with an lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def effective_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Return the learning rate to log: for optimizers that find their own, rate x rate_factor."""
    return rate * able(optimizer).rate_factor


def evaluating(optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    """Context manager in which parameters hold the weights to validate and export, then the trained ones, bit for bit.

    They differ for optimizers that average weights; for others nothing happens. May be nested.
    """
    return able(optimizer).use_averages()


def able(optimizer: torch.optim.Optimizer) -> OptimizerAbilities:
    """Return the optimizer typed as OptimizerAbilities, which every optimizer built by an OptimizerPart is."""
    assert isinstance(optimizer, OptimizerAbilities), f"{type(optimizer).__name__} was not built by an OptimizerPart"
    return optimizer


def build_optimizer(
    part: OptimizerPart,
    layers: Mapping[str, AdapterLayer],
    groups: Params,
    config: OptimizerConfig,
    training: TrainingConfig,
) -> torch.optim.Optimizer:
    """Return the optimizer of a run. It may change the precision of the trainable weights, see AdapterLayer.rounded_.

    Args:
        part: The optimizer.
        layers: Adapter layers by name.
        groups: Their parameters, see parameter_groups.
        config: The optimizer's settings.
        training: The run's.
    """
    before = {name: {key: weight.detach() for key, weight in layer.trainable()} for name, layer in layers.items()}
    optimizer = part.build(groups, config, training.learning_rate, training.weight_decay, training.seed)
    for name, layer in layers.items():
        if any(weight.dtype != before[name][key].dtype for key, weight in layer.trainable()):
            layer.rounded_(before[name])
    return optimizer


def parameter_groups(
    layers: Mapping[str, AdapterLayer], rates: Mapping[str, float], undecayed_parts: frozenset[str] = frozenset()
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """Return the optimizer's input: the parameters, or groups where the learning rate or the weight decay differs.

    A group has an `lr_scale`. Groups of parameters that hold parts of the base have a `weight_decay` of 0.

    Args:
        layers: Adapter layers by name.
        rates: Factors of the learning rate by name.
        undecayed_parts: Names of parameters that are not decayed in any layer, for a plan whose layers have not
            started.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, layer in layers.items():
        undecayed, rate = layer.parts_of_base() | undecayed_parts, rates.get(name, 1.0)
        for part, parameter in layer.trainable():
            groups.setdefault((rate, part not in undecayed), []).append(parameter)
    if groups.keys() == {(1.0, True)}:
        return groups[1.0, True]
    return [_group(params, *key) for key, params in groups.items()]


def _group(params: list[nn.Parameter], factor: float, is_decayed: bool) -> dict[str, Any]:
    group = {"params": params, "lr_scale": factor, "name": f"x {factor:g}"}
    return group if is_decayed else {**group, "name": f"x {factor:g}, no decay", "weight_decay": 0.0}
