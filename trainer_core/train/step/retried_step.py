"""Compute the gradients of a step again: where memory was too small, and where fp16 was."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...adapters.inject import set_micro_
from .state import TrainState


def with_recovery(state: TrainState, compute: Callable[[], Tensor]) -> Tensor:
    """Compute gradients. Retry from gradients of zero where out-of-memory recovery can help."""
    while True:
        try:
            return compute()
        except Exception as error:
            if state.oom_recovery is None or not state.oom_recovery.helps(error):
                raise
        finally:
            set_micro_(state.layers, None)
        state.optimizer.zero_grad(set_to_none=True)
        if state.working:
            state.working.clear_gradients()
        state.oom_recovery.take_()


def within_range(state: TrainState, compute: Callable[[], Tensor]) -> tuple[float, float]:
    """Compute the gradients of a step, and clip them. In fp16, retry with a lower loss scale where they overflow.

    All ranks have the same gradients, and so the same scale.

    Args:
        compute: Returns the mean loss, on the device.
    Returns:
        The loss and the gradient norm before clipping. Either may not be finite: no scale helps then, and it stays.
    """
    scale, before = state.loss_scale, state.loss_scale and replace(state.loss_scale)
    while True:
        total = compute()
        if scale:
            scale.unscale_(state.parameters)
        norm = nn.utils.clip_grad_norm_(state.parameters, state.config.max_grad_norm or math.inf)
        loss, length = torch.stack([total, norm.to(total)]).tolist()  # the only host-device synchronization
        if scale is None:
            return loss, length
        if math.isfinite(length):
            scale.count_()
            return loss, length
        if not math.isfinite(loss) or not scale.lower_():
            state.loss_scale = before
            return loss, length
        state.optimizer.zero_grad(set_to_none=True)
