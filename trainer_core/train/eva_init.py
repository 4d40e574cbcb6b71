"""EVA: initialize the adapters along the directions in which their inputs vary most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapters.initializers import Directions
from ..adapters.layer import AdapterLayer
from ..config.request import TrainRequest
from ..host import Host, Notice
from .step.loop import micro_loss
from .step.state import TrainState

MAX_TOKENS = 256  # evenly spaced tokens of each batch that EVA samples


@torch.no_grad()
def init_from_data_(state: TrainState, request: TrainRequest, host: Host) -> None:
    """With init eva, set each A to the principal directions of its layer's inputs; else do nothing.

    The inputs are those of the run's own first batches, with their noise.
    """
    if request.training.init != "eva":
        return
    count = request.adapter.eva_batches
    host.emit(Notice(f"eva: collecting the activations of {count} batches"))
    directions = {name: Directions(2 * layer.rank) for name, layer in state.layers.items()}
    hooks = [
        layer.register_forward_pre_hook(_covariance_hook(directions[name])) for name, layer in state.layers.items()
    ]
    try:
        for micro in range(count):
            host.check_cancelled()
            micro_loss(state, micro)
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in state.layers.items():
        layer.init_along_(directions[name].rows(layer.rank))
    if state.ema is not None:
        state.ema.begin_(state.layers)


def _covariance_hook(directions: Directions) -> Any:
    def collect(layer: AdapterLayer, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].flatten(0, -2)
        directions.see(tokens[:: -(-len(tokens) // MAX_TOKENS)])

    return collect
