"""bitsandbytes optimizers, whose states take 8 bits per element. They need the optional extra `bnb`."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from ..config.optimizer import OptimizerConfig
from .optimizer import OptimizerAbilities, OptimizerPart, Params, as_list, flat

INSTALL = "pip install 'chroma-trainer[bnb]' (or pip install bitsandbytes)"
FIRST_ON_CPU = (0, 50)  # first version whose 8-bit steps ran on a CPU: tests/contracts/test_optimizers.py
DEVICES = ("cuda", "xpu")


def missing(device_type: str) -> str:
    """Return why bitsandbytes can't run with the installed version on this device, or ''. Does not import it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return f"bitsandbytes is not installed; {INSTALL}, or choose adamw_bf16, which needs no extra package"
    installed = version("bitsandbytes")
    numbers = tuple(int(number) for number in re.findall(r"\d+", installed)[:2])
    if device_type in DEVICES or (device_type == "cpu" and numbers >= FIRST_ON_CPU):
        return ""
    required = ".".join(map(str, FIRST_ON_CPU))
    return (
        f"bitsandbytes {installed} has no 8-bit optimizers for the device {device_type!r}: they need CUDA, or "
        f"{required} or newer on a CPU; choose adamw_bf16, which runs on every device"
    )


class FlatState(OptimizerAbilities):
    """Flattens the state: bitsandbytes saves quantized state in a nested dictionary, but also loads it without one."""

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()  # type: ignore[misc]
        return {**saved, "state": {index: _flatten(values) for index, values in saved["state"].items()}}


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    inner = [value for value in values.values() if isinstance(value, dict)]
    return {k: v for part in (values, *inner) for k, v in part.items() if not isinstance(v, dict)}


def _build_part(
    make: Callable[[Any, OptimizerConfig], tuple[type, dict[str, Any]]],
    stored_name: str,
    uses: set[str],
    rates: tuple[float, float],
):
    def build(
        params: Params, config: OptimizerConfig, learning_rate: float, weight_decay: float, seed: int = 0
    ) -> torch.optim.Optimizer:
        kind, settings = make(importlib.import_module("bitsandbytes.optim"), config)
        flat_kind: Any = type(stored_name, (FlatState, kind), {"stored_name": stored_name})
        groups = as_list(params)
        optimizer = flat_kind(groups, lr=learning_rate, weight_decay=weight_decay, **settings)
        if any(param.is_meta for param in flat(groups)):  # shapes alone, for the memory plan: nothing to page
            optimizer.is_paged = False
        return optimizer

    return OptimizerPart(build=build, uses=frozenset(uses), usual_rates=rates, missing=missing, extra="bnb")


def _adamw8bit(optim: Any, config: OptimizerConfig) -> tuple[type, dict[str, Any]]:
    """AdamW. Source: Dettmers et al. 2021, arXiv:2110.02861."""
    return optim.AdamW8bit, {"betas": (config.beta1 or 0.9, config.beta2 or 0.999), "eps": config.eps or 1e-8}


def _lion8bit_paged(optim: Any, config: OptimizerConfig) -> tuple[type, dict[str, Any]]:
    """Lion. Its states move to host memory when the GPU's memory is full (CUDA)."""
    return optim.PagedLion8bit, {"betas": (config.beta1 or 0.9, config.beta2 or 0.99)}


def _ademamix8bit(optim: Any, config: OptimizerConfig) -> tuple[type, dict[str, Any]]:
    """AdamW with a second, slow momentum. Source: Pagliardini et al. 2024, arXiv:2409.03137."""
    betas = (config.beta1 or 0.9, config.beta2 or 0.999, config.beta3 or 0.9999)
    return optim.AdEMAMix8bit, {"betas": betas, "alpha": config.ademamix_alpha, "eps": config.eps or 1e-8}


ADAMW8BIT = _build_part(_adamw8bit, "AdamW8bit", {"beta1", "beta2", "eps"}, (1e-5, 1e-3))
LION8BIT_PAGED = _build_part(_lion8bit_paged, "PagedLion8bit", {"beta1", "beta2"}, (1e-6, 2e-4))
ADEMAMIX8BIT = _build_part(
    _ademamix8bit, "AdEMAMix8bit", {"beta1", "beta2", "beta3", "eps", "ademamix_alpha"}, (1e-5, 1e-3)
)
