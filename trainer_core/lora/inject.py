"""LoRA layers, put into a frozen model.

Hu et al. 2021, arXiv:2106.09685:  y = W x + b + (alpha / rank) B A x
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITS = ("default", "gaussian")


class LoraLinear(nn.Module):
    """A frozen Linear, quantised or not, with a low-rank update beside it.

    The weights of the update are fp32 masters; the product runs in the precision of the layer's input. alpha / rank is
    multiplied into B before B is rounded, exactly as in the exported file.

    Args:
        base: the layer, (in,) -> (out,).
        rank: r, of A (r, in) and B (out, r).
        alpha: the update is scaled by alpha / rank.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        device = base.weight.device
        self.base = base
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.rank, self.alpha, self.strength = rank, float(alpha), 1.0

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). With strength 0 this is the base layer, exactly."""
        y = self.base(x)
        if self.strength == 0:
            return y
        down, up = self.lora_A.to(x.dtype), (self.lora_B * (self.scale * self.strength)).to(x.dtype)
        inner = F.linear(x, down)
        # One pass over y instead of a product and a sum.
        return torch.addmm(y.flatten(0, -2), inner.flatten(0, -2), up.t()).view_as(y)


def inject_(
    transformer: nn.Module,
    names: Sequence[str],
    rank: int,
    alpha: float,
    init: str = "default",
    generator: torch.Generator | None = None,
) -> dict[str, LoraLinear]:
    """Wrap the named Linear layers. B is 0, so the model's output does not change.

    Args:
        names: full module names, see targets.resolve_targets.
        init: of A. default: Kaiming-uniform with a = sqrt(5), that is uniform in +-1/sqrt(in), as peft's; gaussian:
            normal with deviation 1 / rank.
        generator: on the CPU; drawn from in the order of names. None: A stays 0, to be loaded.
    """
    layers = {name: wrap_(transformer, name, rank, alpha) for name in names}
    if generator is not None:
        for layer in layers.values():
            with torch.no_grad():
                layer.lora_A.copy_(_initial(init, layer.lora_A.shape, generator))
    return layers


def wrap_(transformer: nn.Module, name: str, rank: int, alpha: float) -> LoraLinear:
    """Put a LoRA layer in the place of one Linear."""
    parent, leaf = transformer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    base = getattr(parent, leaf)
    assert isinstance(base, nn.Linear), f"{name} is a {type(base).__name__}, not a Linear"
    layer = LoraLinear(base, rank, alpha)
    setattr(parent, leaf, layer)
    return layer


def remove_(transformer: nn.Module) -> None:
    """Take every LoRA layer out again."""
    for name, layer in lora_layers(transformer).items():
        setattr(transformer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer.base)


def lora_layers(transformer: nn.Module) -> dict[str, LoraLinear]:
    """The LoRA layers in a model by the full name of the layer they wrap, in the model's order."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLinear)}


def trainable_parameters(layers: Mapping[str, LoraLinear]) -> Iterator[tuple[str, nn.Parameter]]:
    """(`name.lora_A`, A) and (`name.lora_B`, B) of each layer, in order."""
    for name, layer in layers.items():
        yield f"{name}.lora_A", layer.lora_A
        yield f"{name}.lora_B", layer.lora_B


def set_strength_(transformer: nn.Module, strength: float) -> None:
    """Multiply every update by this; 0 gives the base model, exactly."""
    for layer in lora_layers(transformer).values():
        layer.strength = float(strength)


def adapter_state(layers: Mapping[str, LoraLinear]) -> dict[str, Tensor]:
    """Copies of the master weights on the CPU, by parameter name."""
    return {name: parameter.detach().cpu().clone() for name, parameter in trainable_parameters(layers)}


def load_adapter_state_(layers: Mapping[str, LoraLinear], state: Mapping[str, Tensor]) -> None:
    """Take up what adapter_state gave. The names must be the same."""
    parameters = dict(trainable_parameters(layers))
    assert parameters.keys() == state.keys(), f"other layers: {sorted(parameters.keys() ^ state.keys())[:3]}"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def _initial(init: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    assert init in INITS, init
    rank, width = shape
    if init == "gaussian":
        return torch.randn(shape, generator=generator) / rank
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(width)
