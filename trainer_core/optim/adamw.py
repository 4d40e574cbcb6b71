"""AdamW, torch's own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

FUSED_DEVICES = frozenset({"cuda"})


def build(params: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay; betas (0.9, 0.999), eps 1e-8.

    One fused kernel a step on CUDA, torch's grouped (foreach) steps elsewhere. Both are elementwise, hence the same on
    every run.

    Args:
        params: what is trained; fp32, all on one device.
        learning_rate: of the first step; the loop sets the rate of each group before each step.
    Source: Loshchilov and Hutter 2017, arXiv:1711.05101.
    """
    params = list(params)
    assert params, "nothing to train"
    fused = all(param.device.type in FUSED_DEVICES for param in params)
    return torch.optim.AdamW(
        params, lr=learning_rate, weight_decay=weight_decay, fused=fused or None, foreach=None if fused else True
    )
