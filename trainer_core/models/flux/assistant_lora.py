"""A LoRA that acts while a model trains and not while it draws.

A model that was distilled to a few steps forgets that when it is trained as a flow. With an assistant on, which has forgotten it
already, the LoRA need not learn to; without it, in drawing, the distillation is still there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.files.load import layer_updates
from ...adapters.lora import LoraPair
from ...errors import UserError

FIELD = "assistant"


class Switch:
    """Shared by an assistant's layers."""

    is_on = True


def check_assistant(transformer: nn.Module, path: Path) -> None:
    """Whether a file can assist a model, which may lie on the meta device.

    Raises:
        UserError: it is no LoRA of this model, or one of another kind than plain LoRA.
    """
    others = {type(u).__name__ for u in layer_updates(transformer, path).values() if not _is_plain(u)}
    if others:
        raise UserError.at(
            FIELD, f"{path.name} is no plain LoRA ({', '.join(sorted(others))}); use one that is ({path})"
        )


def add_assistant_(transformer: nn.Module, path: Path, dtype: torch.dtype) -> Switch:
    """Let a file's updates act beside the layers they are for, which may be quantised, and become adapted later.

    Args:
        dtype: of its factors, which lie with the layer's own weights.
    Raises:
        UserError: as of check_assistant.
    """
    check_assistant(transformer, path)
    switch = Switch()
    for name, update in layer_updates(transformer, path).items():
        assert isinstance(update, LoraPair)
        layer: Any = transformer.get_submodule(name)
        for key, factor in (("assistant_down", update.down), ("assistant_up", update.up)):
            layer.register_buffer(key, factor.to(dtype), persistent=False)
        layer.register_forward_hook(_Assisted(switch))
    return switch


class _Assisted:
    """A hook on a layer's forward: the assistant's product on top. A hook, so that it acts outside of what an offloaded layer's own
    forward computes gradients by (offload.py)."""

    def __init__(self, switch: Switch):
        self.switch = switch

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        if not self.switch.is_on:
            return y
        down, up = (part.to(y.dtype) for part in (layer.assistant_down, layer.assistant_up))
        return y + F.linear(F.linear(inputs[0], down), up)


def _is_plain(update: Any) -> bool:
    return isinstance(update, LoraPair) and not update.is_dora
