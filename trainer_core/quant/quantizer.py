"""The interface of a quantization level. A new level is a class with this interface and one registry line.

A level defines how a weight is encoded into plain tensors and decoded again. Layers, caches and loading are the same
for all levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import reason_of
from ..storage.gguf.blocks import PackedWeight, decode_any, unpack_
from .packages import EXTRAS, missing_for, version_of
from .quantized_linear import QuantizedLinear

PROBE_SHAPE = (64, 256)
PROBE_ERROR = 0.5  # relative; the error of 2 bits is 0.3, that of a wrong kernel 1


class Quantizer(ABC):
    """Stores the weights of the frozen base model in fewer bits.

    Attributes:
        extra: Name of its package in packages.EXTRAS; "" if torch is enough.
        is_plain: Whether it leaves every weight as it is.
    """

    extra = ""
    is_plain = False

    @abstractmethod
    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the weight as named plain tensors on its device: integers, or floats that safetensors supports.

        It must also work on the meta device, because the memory plan uses layers without data.

        Args:
            weight: (out, in), floating point.
        """

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the decoded weight, (out, in), rounded to dtype once.

        It is a new tensor on the device of the stored tensors.
        """

    def missing(self) -> str:
        """Return "" if its package is installed, else what is missing and how to install it. Imports nothing."""
        return missing_for(self.extra)

    def unfit(self, device: torch.device, encoder: torch.device | None = None) -> str:
        """Return "" if a small test weight is decoded correctly, else the reason. Most levels also encode it.

        Args:
            device: Where the weight is decoded.
            encoder: Where the weight is encoded; None for the CPU.
        """
        try:
            encoded, weight = self.probe(encoder)
            stored = {name: tensor.to(device) for name, tensor in encoded.items()}
            decoded = self.decode(stored, PROBE_SHAPE, torch.float32).cpu()
        except Exception as error:  # packages raise all kinds of errors if a kernel is missing
            return f"can't run on {device}: {reason_of(error)}; choose another level"
        error_share = ((decoded - weight).norm() / weight.norm()).item()
        if error_share <= PROBE_ERROR:
            return ""
        return f"gives wrong results on {device} (relative error {error_share:.0%}); choose another level"

    def probe(self, encoder: torch.device | None) -> tuple[dict[str, Tensor], Tensor]:
        """Return a small encoded weight, and the weight on the CPU."""
        weight = torch.linspace(-1, 1, PROBE_SHAPE[0] * PROBE_SHAPE[1]).reshape(PROBE_SHAPE)
        weight = weight[:, torch.arange(PROBE_SHAPE[1]) * 37 % PROBE_SHAPE[1]]  # unsorted rows
        return self.encode(weight.to(encoder or weight.device)), weight

    @property
    def version(self) -> str:
        """Package and version, because other versions may encode different bits."""
        return f"{EXTRAS[self.extra]} {version_of(EXTRAS[self.extra])}" if self.extra else "own"

    def layer(self, linear: nn.Linear, device: torch.device | None = None) -> nn.Linear:
        """Return the quantized layer that replaces a Linear.

        Args:
            linear: The layer.
            device: Where the weight is encoded; None for its own device. The result is on the weight's device.
        """
        weight = unpack_(linear).weight.detach()
        with torch.no_grad():
            stored = self.encode(weight.to(device) if device is not None else weight)
        on_home = {name: tensor.to(weight.device) for name, tensor in stored.items()}
        shape = linear.out_features, linear.in_features
        return QuantizedLinear(self, on_home, shape, weight.dtype, linear.bias)

    def quantize_(self, transformer: nn.Module, keep: tuple[str, ...]) -> nn.Module:
        """Quantize the Linear layers of a loaded model in place, one after the other.

        This runs before a LoRA is injected: afterwards no parameter of the base model requires a gradient.

        Args:
            transformer: The model.
            keep: Patterns of module names that stay in full precision.
        """
        for name in [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]:
            if not is_kept(name, keep):
                parent, leaf = transformer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                setattr(parent, leaf, self.layer(getattr(parent, leaf)))
        return transformer.requires_grad_(False)


def is_kept(name: str, keep: tuple[str, ...]) -> bool:
    """Return whether the module with this full name stays in full precision."""
    return any(fnmatchcase(name, pattern) for pattern in keep)


class GgufBlocks:
    """Decodes what a file stores for each product, see PackedWeight in storage/gguf/blocks.py. Implements Format."""

    def __init__(self, type: str):
        self.type = type

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return decode_any(self.type, stored, shape, dtype)


class KeepPrecision(Quantizer):
    """Leaves every layer as it is: a weight that a file stores in fewer bits stays so."""

    is_plain = True

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight}

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return stored["weight"].to(dtype)

    def layer(self, linear: nn.Linear, device: torch.device | None = None) -> nn.Linear:
        packed: Any = getattr(linear, "packed", None)
        if not isinstance(packed, PackedWeight):
            return linear
        shape = linear.out_features, linear.in_features
        return QuantizedLinear(GgufBlocks(packed.type), packed.stored, shape, linear.weight.dtype, linear.bias)
