"""Attach the adapter of a run: check that it fits before weights are loaded, inject it, and initialize it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..adapters.ema import Ema
from ..adapters.files.load import match, read_lora_file
from ..adapters.initializers import uniform
from ..adapters.inject import inject_, live_state, set_dropout_
from ..adapters.layer import AdapterLayer, IncompatibleUpdate, Update
from ..adapters.targets import resolve_targets
from ..config.adapter import NO_LORA
from ..config.request import TrainRequest
from ..errors import UserError, reason_of
from ..full_rank.trained_layer import ShardedLayer
from ..host import Host, Notice
from ..models.family import Family
from ..runs.layout import CHECKPOINT_WEIGHTS
from ..seeds import generator
from ..storage.safetensors_header import header_of
from .block_lr import rates_of

NUM_SHOWN = 3


@dataclass(frozen=True)
class Injected:
    """An adapter that was injected into a model."""

    layers: dict[str, AdapterLayer]  # the trained layers by name
    rates: dict[str, float]  # factor of the learning rate by layer


def check_fit(request: TrainRequest, family: Family) -> None:
    """Check everything about the adapter that depends on the model's modules, without weights.

    Raises:
        UserError: targets, block_lr or init_lora do not fit the model.
    """
    shared = family.shared_transformer(request.model)
    names = list(learning(shared, family, request))
    updates, _ = _file_updates(shared, request)
    config, training = request.adapter, request.training
    if updates:
        layers = inject_(copy.deepcopy(shared), names, training.rank, training.alpha, config=config)
        _load_updates_(layers, updates, training.seed)
        if config.checkpoint:
            _refuse_other_weights(layers, Path(config.checkpoint))


def _refuse_other_weights(layers: Mapping[str, AdapterLayer], checkpoint: Path) -> None:
    """Check that a checkpoint's weights are those of the layers, by its header.

    Raises:
        UserError: they are not, or can't be read.
    """
    path = checkpoint / CHECKPOINT_WEIGHTS
    try:
        header = header_of(path)[0]
    except (OSError, ValueError) as error:
        raise UserError.at("init_optimizer", f"{path} can't be read: {reason_of(error)}; use new") from error
    before = {name: list(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    now = {name: list(tensor.shape) for name, tensor in live_state(layers).items()}
    if other := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        text = f"{len(other)} of the {len(before)} weights of {checkpoint} have another shape or are not trained now"
        raise UserError.at("init_optimizer", f"{text}, such as {other[0]}; use the settings of its run, or new")


def inject_adapter_(
    transformer: nn.Module, family: Family, request: TrainRequest, device: torch.device, host: Host
) -> Injected:
    """Inject the adapter into a loaded (and quantized) model and initialize it.

    Init eva follows in train/eva_init.py.
    """
    config, training = request.adapter, request.training
    rates = learning(transformer, family, request)
    updates, left_out = _file_updates(transformer, request)
    # Memory-mapped from disk: only layers that are read take memory.
    clean = family.load_transformer(request.model) if training.init == "loftq" else None
    layers = inject_(
        transformer, list(rates), training.rank, training.alpha, training.init, generator(training.seed, "init"),
        config, clean=clean, device=device, kind=ShardedLayer if training.is_sharded else None,
    )  # fmt: skip
    if updates:
        _load_updates_(layers, updates, training.seed)
        num_new = len(layers) - len(updates)
        more = f"; {num_new} layers that are not in the file are newly initialized" if num_new else ""
        host.emit(Notice(f"training continues from {Path(config.init_lora).name}: {len(updates)} layers{more}"))
        if left_out:
            text = f"{Path(config.init_lora).name}: only the transformer's layers are used; left out: {left_out}"
            host.emit(Notice(text, "warning"))
    set_dropout_(layers, config.dropout, training.seed)
    return Injected(layers, rates)


def starts_beside_base(request: TrainRequest) -> bool:
    """Return whether a new run starts from other outputs than the base model's: from a LoRA file, or corrected by loftq."""
    return request.adapter.init_lora != NO_LORA or request.training.init == "loftq"


def new_ema(request: TrainRequest, layers: Mapping[str, AdapterLayer]) -> Ema | None:
    """Return the exponential moving average of the weights; None where the settings turn it off."""
    config = request.adapter
    return Ema(layers, config.ema_decay, on_host=config.is_full) if config.ema_decay else None


def learning(transformer: nn.Module, family: Family, request: TrainRequest) -> dict[str, float]:
    """Return the names of the trained layers, in the model's order, with each one's factor of the learning rate.

    Raises:
        UserError: targets or block_lr match no layer.
    """
    names = resolve_targets(transformer, family, request.training.targets, request.adapter.is_full)
    rates = rates_of(names, request.adapter.block_lr)
    return {name: rate for name, rate in rates.items() if rate}


def _file_updates(transformer: nn.Module, request: TrainRequest) -> tuple[dict[str, Update], str]:
    """Return the updates of init_lora by layer, and what else the file contains, in words.

    Raises:
        UserError: The file is not for this model, or has values that are not finite.
    """
    path = request.adapter.init_lora
    if path == NO_LORA:
        return {}, ""
    file = read_lora_file(path)
    matched, bad = match(transformer, file.updates)
    if bad:
        examples = ", ".join(sorted(bad.values())[:NUM_SHOWN])
        raise UserError.at(
            "init_lora",
            f"{Path(path).name} is not for this model: {len(bad)} of {len(file.updates)} layers do not fit, "
            f"such as {examples}",
        )
    if broken := file.broken_layers():
        raise UserError.at(
            "init_lora",
            f"{Path(path).name} is broken: {len(broken)} of {len(file.updates)} layers contain NaN or infinite values, "
            f"such as {', '.join(broken[:NUM_SHOWN])}; use an earlier checkpoint of it",
        )
    # A file with fused weights may hold rows that were never trained.
    return {name: update for name, update in matched.items() if not update.is_zero()}, file.left_out_text


def _load_updates_(layers: Mapping[str, AdapterLayer], updates: Mapping[str, Update], seed: int) -> None:
    untrained = sorted(updates.keys() - layers.keys())
    if untrained:
        examples = ", ".join(untrained[:NUM_SHOWN])
        raise UserError.at(
            "init_lora",
            f"{len(untrained)} of the file's {len(updates)} layers are not trained, such as {examples}; "
            "choose targets (and block_lr) that include them",
        )
    rng = generator(seed, "init", "beyond the file")
    faults = []
    for name, update in updates.items():
        try:
            layers[name].load_update_(update, lambda shape: uniform(shape, rng))
        except IncompatibleUpdate as fault:
            faults.append(f"{name}: {fault}")
    if faults:
        raise UserError.at(
            "init_lora", f"can't continue from {len(faults)} of the file's {len(updates)} layers, such as {faults[0]}"
        )
