"""What a quantisation level brings: a class by this contract and one registry line.

A level says how one weight is encoded into plain tensors and decoded again. Layers, caches and loading are the same for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..errors import reason_of
from .packages import EXTRAS, missing_for, version_of
from .quantized_linear import QuantizedLinear

PROBE_SHAPE = (64, 256)
PROBE_ERROR = 0.5  # relative; 2 bits are off by 0.3, a wrong kernel by 1


class Quantizer(ABC):
    """Stores the weights of a frozen base in fewer bits."""

    extra = ""  # the optional extra that brings its package (packages.EXTRAS), "" for torch alone
    is_plain = False  # keeps everything as it is

    @abstractmethod
    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The weight, (out, in), floating point, as named plain tensors on its device. Integers, or floats in safetensors' types.

        On the meta device too: the memory plan counts with layers that hold no numbers.
        """

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The way back, rounded to dtype once: (out, in), a new tensor on the device of what is stored."""

    def missing(self) -> str:
        """'' where its package is installed, else what is missing and how to get it. Imports nothing."""
        return missing_for(self.extra)

    def unfit(self, device: torch.device, encoder: torch.device | None = None) -> str:
        """'' where it can be encoded on the one device (None: the CPU) and decoded on the other, found by trying a small weight; else
        the reason in words."""
        weight = torch.linspace(-1, 1, PROBE_SHAPE[0] * PROBE_SHAPE[1]).reshape(PROBE_SHAPE)
        weight = weight[:, torch.arange(PROBE_SHAPE[1]) * 37 % PROBE_SHAPE[1]]  # rows that are not sorted
        try:
            encoded = self.encode(weight.to(encoder or weight.device))
            stored = {name: tensor.to(device) for name, tensor in encoded.items()}
            decoded = self.decode(stored, PROBE_SHAPE, torch.float32).cpu()
        except Exception as error:  # packages raise whatever they like where a kernel is missing
            return f"can't run on {device}: {reason_of(error)}; choose another level"
        off = ((decoded - weight).norm() / weight.norm()).item()
        return "" if off <= PROBE_ERROR else f"gives wrong numbers on {device} (off by {off:.0%}); choose another level"

    @property
    def version(self) -> str:
        """Package and version: other versions may encode other bits."""
        return f"{EXTRAS[self.extra]} {version_of(EXTRAS[self.extra])}" if self.extra else "own"

    def layer(self, linear: nn.Linear, device: torch.device | None = None) -> nn.Linear:
        """The quantised layer that takes a Linear's place.

        Args:
            device: where it is encoded; None: where the weight is. What comes out lies where the weight was.
        """
        weight = linear.weight.detach()
        with torch.no_grad():
            stored = self.encode(weight.to(device) if device is not None else weight)
        on_home = {name: tensor.to(weight.device) for name, tensor in stored.items()}
        shape = linear.out_features, linear.in_features
        return QuantizedLinear(self, on_home, shape, weight.dtype, linear.bias)

    def quantize_(self, transformer: nn.Module, keep: tuple[str, ...]) -> nn.Module:
        """Quantise the Linears of a loaded model in place, one after the other, but for modules whose name matches a pattern of `keep`.

        Runs before a LoRA is injected: afterwards nothing of the base requires a gradient.
        """
        for name in [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]:
            if not is_kept(name, keep):
                parent, leaf = transformer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                setattr(parent, leaf, self.layer(getattr(parent, leaf)))
        return transformer.requires_grad_(False)


def is_kept(name: str, keep: tuple[str, ...]) -> bool:
    """Whether a module of this full name stays in full precision."""
    return any(fnmatchcase(name, pattern) for pattern in keep)


class KeepPrecision(Quantizer):
    """Leaves every layer as it is."""

    is_plain = True

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight}

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return stored["weight"].to(dtype)

    def layer(self, linear: nn.Linear, device: torch.device | None = None) -> nn.Linear:
        return linear
