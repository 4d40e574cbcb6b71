"""Put adapter layers into a frozen model. The kind of adapter is hidden behind the interface in layer.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config.adapter import AdapterConfig
from ..registry import load
from .layer import AdapterLayer, Dropout, Start
from .lora import LoraLinear

__all__ = [
    "AdapterLayer", "LoraLinear", "adapter_state", "inject_", "live_state", "load_adapter_state_", "lora_layers", "remove_",
    "replace_", "set_dropout_", "set_micro_", "set_strength_", "trainable_parameters", "without_dropout",
    "without_updates",
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
    kind: type[AdapterLayer] | None = None,
) -> dict[str, AdapterLayer]:
    """Replace the named Linear layers with adapter layers.

    Kind full also trains norms and convolutions, in their place.

    The update starts at 0, so the model's output does not change. The exception is loftq, which corrects the quantized
    base.

    Args:
        transformer: The model, changed in place.
        names: Full module names, see targets.resolve_targets.
        rank: Rank of the adapter.
        alpha: Alpha of the adapter.
        init: See TrainingConfig.init; must be one that the kind supports.
        generator: CPU generator, used in the order of names. None: the weights stay 0, to be loaded later.
        config: The kind of adapter and its own settings.
        clean: The model before quantization, for loftq.
        device: Device on which weights are decomposed. None: the device of the weights.
        kind: Class of the layers. None: that of config.kind.
    Returns:
        The adapter layers by full module name.
    """
    chosen: type[AdapterLayer] = kind or load("weights" if config.is_full else "adapter", config.kind)
    put = _train_whole_ if config.is_full else replace_
    layers = {name: put(transformer, name, lambda base: chosen.new(base, rank, alpha, config)) for name in names}
    if generator is not None:
        for name, layer in layers.items():
            weight = None if clean is None else clean.get_submodule(name).weight
            assert weight is None or isinstance(weight, Tensor)
            layer.start_(Start(init, generator, config.svd_iterations, weight, device))
    return layers


def _train_whole_(transformer: nn.Module, name: str, make: Callable[[Any], AdapterLayer]) -> AdapterLayer:
    """As replace_(); a module that is no Linear, such as a norm, stays in its place."""
    module = transformer.get_submodule(name)
    if isinstance(module, nn.Linear):
        return replace_(transformer, name, make)
    layer = make(module)
    layer.name = name
    return layer


def replace_(transformer: nn.Module, name: str, make: Callable[[nn.Linear], AdapterLayer]) -> AdapterLayer:
    """Replace one Linear with the adapter layer that `make` returns for it."""
    parent, leaf = transformer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    base = getattr(parent, leaf)
    assert isinstance(base, nn.Linear), f"{name} is a {type(base).__name__}, not a Linear"
    layer = make(base)
    layer.name = name
    setattr(parent, leaf, layer)
    return layer


def remove_(transformer: nn.Module) -> None:
    """Replace every adapter layer with its base layer."""
    for name, layer in lora_layers(transformer).items():
        setattr(transformer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer.base)


def lora_layers(transformer: nn.Module) -> dict[str, AdapterLayer]:
    """Return a model's adapter layers by the full name of the layer they wrap, in model order."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, AdapterLayer)}


def trainable_parameters(layers: Mapping[str, AdapterLayer]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trainable parameters of each layer, such as (`name.lora_A`, A) and (`name.lora_B`, B)."""
    for name, layer in layers.items():
        for part, parameter in layer.trainable():
            yield f"{name}.{part}", parameter


def set_strength_(transformer: nn.Module, strength: float) -> None:
    """Set the multiplier of every update. 0 gives exactly the base model."""
    for layer in lora_layers(transformer).values():
        layer.strength = float(strength)


@contextmanager
def without_updates(transformer: nn.Module) -> Iterator[None]:
    """Context manager in which the model is what its updates are relative to, then sets all strengths to 1.

    That is the base model; with init loftq it is the quantized one with its correction, which stands for the clean one.
    """
    layers = lora_layers(transformer).values()
    set_strength_(transformer, 0.0)
    for layer in layers:
        layer.corrects_base = True
    try:
        yield
    finally:
        set_strength_(transformer, 1.0)
        for layer in layers:
            layer.corrects_base = False


def set_dropout_(layers: Mapping[str, AdapterLayer], rate: float, seed: int) -> None:
    """Enable dropout on the updates' inputs. It is active while set_micro_ has set a micro-batch."""
    dropout = Dropout(rate, seed) if rate else None
    for layer in layers.values():
        layer.dropout = dropout


def set_micro_(layers: Mapping[str, AdapterLayer], micro: int | None) -> None:
    """Set the index of the micro-batch being trained. None disables dropout."""
    for dropout in {id(d): d for layer in layers.values() if (d := layer.dropout)}.values():
        dropout.micro = micro


@contextmanager
def without_dropout(layers: Mapping[str, AdapterLayer]) -> Iterator[None]:
    """Context manager that disables dropout, then restores the current micro-batch."""
    named = {id(d): (d, d.micro) for layer in layers.values() if (d := layer.dropout)}
    set_micro_(layers, None)
    try:
        yield
    finally:
        for dropout, micro in named.values():
            dropout.micro = micro


def live_state(layers: Mapping[str, AdapterLayer]) -> dict[str, Tensor]:
    """Return what adapter_state copies, without a copy: the tensors change with the next step."""
    return {name: tensor.detach() for name, tensor in _state(layers)}


def adapter_state(layers: Mapping[str, AdapterLayer]) -> dict[str, Tensor]:
    """Return CPU copies of what a checkpoint stores: the fp32 weights, and initial values if they are needed later."""
    return {name: tensor.detach().cpu().clone() for name, tensor in _state(layers)}


def load_adapter_state_(layers: Mapping[str, AdapterLayer], state: Mapping[str, Tensor]) -> None:
    """Load what adapter_state returned. The parameter names must match."""
    tensors = dict(_state(layers))
    assert tensors.keys() == state.keys(), f"other layers: {sorted(tensors.keys() ^ state.keys())[:3]}"
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(state[name])


def _state(layers: Mapping[str, AdapterLayer]) -> Iterator[tuple[str, Tensor]]:
    for name, layer in layers.items():
        for part, tensor in layer.state():
            yield f"{name}.{part}", tensor
