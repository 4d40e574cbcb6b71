"""Adapter layers, put into a frozen model. Of which kind they are is the layers' own matter, see contract.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..config.adapter import AdapterConfig
from ..registry import load
from .layer import AdapterLayer, Dropout, Start
from .lora import LoraLinear

__all__ = [
    "AdapterLayer", "LoraLinear", "adapter_state", "inject_", "load_adapter_state_", "lora_layers", "remove_", "replace_",
    "set_dropout_", "set_micro_", "set_strength_", "trainable_parameters", "without_dropout",
]  # fmt: skip

PLAIN = AdapterConfig()


def inject_(
    transformer: nn.Module,
    names: Sequence[str],
    rank: int,
    alpha: float,
    init: str = "default",
    generator: torch.Generator | None = None,
    config: AdapterConfig = PLAIN,
    clean: nn.Module | None = None,
    device: torch.device | None = None,
) -> dict[str, AdapterLayer]:
    """Wrap the named Linear layers. The update is 0, so that the model's output does not change (loftq: it mends the base).

    Args:
        names: full module names, see targets.resolve_targets.
        init: see TrainingConfig.init; one that the kind knows.
        generator: on the CPU; drawn from in the order of names. None: the weights stay 0, to be loaded.
        config: the kind, and what belongs to it.
        clean: the model before it was quantised, for loftq.
        device: where weights are decomposed; None: where they are.
    """
    kind: type[AdapterLayer] = load("adapter", config.kind)
    layers = {name: replace_(transformer, name, lambda base: kind.new(base, rank, alpha, config)) for name in names}
    if generator is not None:
        for name, layer in layers.items():
            weight = None if clean is None else clean.get_submodule(name).weight
            assert weight is None or isinstance(weight, Tensor)
            layer.start_(Start(init, generator, config.svd_iterations, weight, device))
    return layers


def replace_(transformer: nn.Module, name: str, make: Callable[[nn.Linear], AdapterLayer]) -> AdapterLayer:
    """Put an adapter's layer in the place of one Linear."""
    parent, leaf = transformer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    base = getattr(parent, leaf)
    assert isinstance(base, nn.Linear), f"{name} is a {type(base).__name__}, not a Linear"
    layer = make(base)
    layer.name = name
    setattr(parent, leaf, layer)
    return layer


def remove_(transformer: nn.Module) -> None:
    """Take every adapter out again."""
    for name, layer in lora_layers(transformer).items():
        setattr(transformer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer.base)


def lora_layers(transformer: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter's layers in a model by the full name of the layer they wrap, in the model's order."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, AdapterLayer)}


def trainable_parameters(layers: Mapping[str, AdapterLayer]) -> Iterator[tuple[str, nn.Parameter]]:
    """What learns, layer by layer, such as (`name.lora_A`, A) and (`name.lora_B`, B)."""
    for name, layer in layers.items():
        for part, parameter in layer.trainable():
            yield f"{name}.{part}", parameter


def set_strength_(transformer: nn.Module, strength: float) -> None:
    """Multiply every update by this; 0 gives the base model, exactly."""
    for layer in lora_layers(transformer).values():
        layer.strength = float(strength)


def set_dropout_(layers: Mapping[str, AdapterLayer], rate: float, seed: int) -> None:
    """Elements of the updates' inputs are zeroed with this probability while set_micro_ has named a micro-batch."""
    dropout = Dropout(rate, seed) if rate else None
    for layer in layers.values():
        layer.dropout = dropout


def set_micro_(layers: Mapping[str, AdapterLayer], micro: int | None) -> None:
    """Say which micro-batch is trained now; None: none, and nothing drops."""
    for dropout in {id(d): d for layer in layers.values() if (d := layer.dropout)}.values():
        dropout.micro = micro


@contextmanager
def without_dropout(layers: Mapping[str, AdapterLayer]) -> Iterator[None]:
    """While it lasts nothing drops; then the micro-batch that was named is again."""
    named = {id(d): (d, d.micro) for layer in layers.values() if (d := layer.dropout)}
    set_micro_(layers, None)
    try:
        yield
    finally:
        for dropout, micro in named.values():
            dropout.micro = micro


def adapter_state(layers: Mapping[str, AdapterLayer]) -> dict[str, Tensor]:
    """Copies on the CPU of what a checkpoint must hold: the master weights, and what they started from where that matters."""
    return {name: tensor.detach().cpu().clone() for name, tensor in _state(layers)}


def load_adapter_state_(layers: Mapping[str, AdapterLayer], state: Mapping[str, Tensor]) -> None:
    """Take up what adapter_state gave. The names must be the same."""
    tensors = dict(_state(layers))
    assert tensors.keys() == state.keys(), f"other layers: {sorted(tensors.keys() ^ state.keys())[:3]}"
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(state[name])


def _state(layers: Mapping[str, AdapterLayer]) -> Iterator[tuple[str, Tensor]]:
    for name, layer in layers.items():
        for part, tensor in layer.state():
            yield f"{name}.{part}", tensor
