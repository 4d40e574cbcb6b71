"""The optimiser's groups, where blocks learn at rates of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..adapters.layer import AdapterLayer


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
