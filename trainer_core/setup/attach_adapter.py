"""The adapter of a run: what can't work is said before weights are loaded, then it is put into the model and started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..adapters.block_lr import rates_of
from ..adapters.ema import Ema
from ..adapters.files.load import match, read_lora
from ..adapters.initializers import uniform
from ..adapters.inject import inject_, set_dropout_
from ..adapters.layer import AdapterLayer, IncompatibleUpdate, Update
from ..adapters.targets import resolve_targets
from ..config.adapter import NO_LORA
from ..config.request import TrainRequest
from ..errors import UserError
from ..host import Host, Notice
from ..models.family import Family
from ..seeds import generator

NUM_SHOWN = 3


@dataclass(frozen=True)
class Injected:
    """The layers that learn, by name, and each one's factor of the learning rate."""

    layers: dict[str, AdapterLayer]
    rates: dict[str, float]


def check_fit(request: TrainRequest, family: Family) -> None:
    """Everything about the adapter that shows on the model's modules alone, without weights.

    Raises:
        UserError: targets, block_lr or init_lora don't fit the model.
    """
    empty = family.empty_transformer(request.model)
    names = list(learning(empty, family, request))
    updates = _file_updates(empty, request)
    config, training = request.adapter, request.training
    if updates:
        _take_up_(inject_(empty, names, training.rank, training.alpha, config=config), updates, training.seed)


def inject_adapter_(
    transformer: nn.Module, family: Family, request: TrainRequest, device: torch.device, host: Host
) -> Injected:
    """Put the adapter into a loaded (and quantised) model and start it; eva's directions come later."""
    config, training = request.adapter, request.training
    rates = learning(transformer, family, request)
    updates = _file_updates(transformer, request)
    # Mapped from disk: only the layers that are looked at come into memory.
    clean = family.load_transformer(request.model) if training.init == "loftq" else None
    layers = inject_(
        transformer, list(rates), training.rank, training.alpha, training.init, generator(training.seed, "init"), config,
        clean=clean, device=device,
    )  # fmt: skip
    if updates:
        _take_up_(layers, updates, training.seed)
        anew = len(layers) - len(updates)
        more = f"; {anew} layers that it lacks start anew" if anew else ""
        host.emit(Notice(f"goes on from {Path(config.init_lora).name}: {len(updates)} layers{more}"))
    set_dropout_(layers, config.dropout, training.seed)
    return Injected(layers, rates)


def new_ema(request: TrainRequest, layers: Mapping[str, AdapterLayer]) -> Ema | None:
    """The average that the settings ask for."""
    return Ema(layers, request.adapter.ema_decay) if request.adapter.ema_decay else None


def learning(transformer: nn.Module, family: Family, request: TrainRequest) -> dict[str, float]:
    """Names of the layers that learn, in the model's order, and each one's factor of the learning rate.

    Raises:
        UserError: targets or block_lr fit no layer.
    """
    rates = rates_of(resolve_targets(transformer, family, request.training.targets), request.adapter.block_lr)
    return {name: rate for name, rate in rates.items() if rate}


def _file_updates(transformer: nn.Module, request: TrainRequest) -> dict[str, Update]:
    path = request.adapter.init_lora
    if path == NO_LORA:
        return {}
    updates = read_lora(path)
    found, bad = match(transformer, updates)
    if bad:
        shown = ", ".join(sorted(bad.values())[:NUM_SHOWN])
        raise UserError.at(
            "init_lora",
            f"{Path(path).name} is not of this model: {len(bad)} of {len(updates)} layers do not fit, such as {shown}",
        )
    # Of fused weights a file may hold rows that never learnt.
    return {name: update for name, update in found.items() if not update.is_zero()}


def _take_up_(layers: Mapping[str, AdapterLayer], updates: Mapping[str, Update], seed: int) -> None:
    idle = sorted(updates.keys() - layers.keys())
    if idle:
        raise UserError.at(
            "init_lora",
            f"{len(idle)} of the file's {len(updates)} layers are not trained, such as {', '.join(idle[:NUM_SHOWN])}; "
            "choose targets (and block_lr) that hold them",
        )
    draw = generator(seed, "init", "beyond the file")
    faults = []
    for name, update in updates.items():
        try:
            layers[name].load_update_(update, lambda shape: uniform(shape, draw))
        except IncompatibleUpdate as fault:
            faults.append(f"{name}: {fault}")
    if faults:
        raise UserError.at(
            "init_lora", f"{len(faults)} of {len(updates)} layers can't be gone on from, such as {faults[0]}"
        )
