"""An assistant LoRA, which is active in training and inactive in sampling.

A model that was distilled to a few steps loses the distillation when it is trained as a flow model. The assistant LoRA
has already undone the distillation, so the trained LoRA need not learn to. In sampling, without the assistant, the
distillation is still there.
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
    """On/off switch shared by an assistant's layers."""

    is_on = True


def check_assistant(transformer: nn.Module, path: Path) -> None:
    """Check that a file can be the assistant of a model, which may be on the meta device.

    Raises:
        UserError: It is not a LoRA of this model, or not a plain LoRA.
    """
    updates = [update for update in layer_updates(transformer, path).values() if not _is_plain(update)]
    other_kinds = {"dora" if isinstance(update, LoraPair) else update.kind for update in updates}
    if other_kinds:
        raise UserError.at(
            FIELD, f"{path.name} is not a plain LoRA ({', '.join(sorted(other_kinds))}); use a plain LoRA file ({path})"
        )


def add_assistant_(transformer: nn.Module, path: Path, dtype: torch.dtype) -> Switch:
    """Add a LoRA file to its layers, which may be quantized and may get an adapter later.

    Args:
        transformer: The model.
        path: The LoRA file.
        dtype: Dtype of its factors, which are stored on the layers' device.
    Returns:
        The switch that enables and disables the assistant.
    Raises:
        UserError: See check_assistant.
    """
    check_assistant(transformer, path)
    switch = Switch()
    for name, update in layer_updates(transformer, path).items():
        assert isinstance(update, LoraPair)
        layer: Any = transformer.get_submodule(name)
        for key, factor in (("assistant_down", update.down), ("assistant_up", update.up)):
            layer.register_buffer(key, factor.to(dtype), persistent=False)
        layer.register_forward_hook(_AddAssistant(switch))
    return switch


class _AddAssistant:
    """Forward hook that adds the assistant's product to a layer's output.

    As a hook it runs outside of the custom autograd function of an offloaded layer (memory/group_offload.py).
    """

    def __init__(self, switch: Switch):
        self.switch = switch

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        if not self.switch.is_on:
            return y
        down, up = (part.to(y.dtype) for part in (layer.assistant_down, layer.assistant_up))
        return y + F.linear(F.linear(inputs[0], down), up)


def _is_plain(update: Any) -> bool:
    return isinstance(update, LoraPair) and not update.is_dora
