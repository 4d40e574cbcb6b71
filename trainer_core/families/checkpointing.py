"""Gradient checkpointing, block by block: activations inside a block are computed again in the backward pass.

diffusers' own switch drops Chroma's mask in single blocks (LoRA gradient off by 0.58 relative, diffusers 0.42.1), so we
wrap the blocks ourselves, with everything they are called with.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks_(blocks: Sequence[nn.Module], interval: int = 1) -> None:
    """Recompute the activations of every `interval`-th block, the first among them, in the backward pass.

    Same outputs and gradients; once is enough. Goes around what a block's forward is by then (families/offload.py).
    """
    for block in list(blocks)[::interval]:
        if not is_checkpointed(block):
            block.forward = functools.partial(_recomputed, block.forward)


def store_blocks_(blocks: Sequence[nn.Module]) -> None:
    """Undo checkpoint_blocks_: activations are stored again."""
    for block in blocks:
        if is_checkpointed(block):
            inner = block.__dict__.pop("forward").args[0]
            if getattr(inner, "__self__", None) is not block:  # not the class's own: a wrapper lay within
                block.forward = inner


def is_checkpointed(block: nn.Module) -> bool:
    """Whether checkpoint_blocks_ was here."""
    forward = block.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func is _recomputed


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    names, count = list(kwargs), len(args)

    def again(*values: Any) -> Any:
        return forward(*values[:count], **dict(zip(names, values[count:], strict=True)))

    # By position: torch keeps tensors among keywords out of reach of hooks on what is saved (families/saved.py).
    # Nothing in a block draws random numbers, so saving and restoring their state (a device sync) is left out.
    return checkpoint(again, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=False)
