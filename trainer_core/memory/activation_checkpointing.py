"""Gradient checkpointing, block by block: activations inside a block are computed again in the backward pass.

diffusers' own switch drops Chroma's mask in single blocks (LoRA gradient off by 0.58 relative, diffusers 0.42.1), so we
wrap the blocks ourselves, with everything they are called with.

Only what gradients read is computed again. The products that end a block are gated and added to its input, and no gradient
reads them: the second pass leaves them out, five twelfths of a single block's products, a third of a double block's. The last
block is not computed again at all: when the backward pass begins, what it would keep is what it would compute first
(docs/decisions/0020).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INTERVALS = (64, 8, 4, 3, 2, 1)  # of checkpointing, from the fastest


def places_to_recompute(num_blocks: int, interval: int = 1, spare_last: bool = True) -> range:
    """Of the blocks that checkpoint_blocks_ computes again: every `interval`-th, the first among them.

    Args:
        spare_last: not the last block. Where weights or activations leave the device it would have to bring back what it keeps.
    """
    return range(0, num_blocks - spare_last, interval)


def checkpoint_blocks_(blocks: Sequence[nn.Module], interval: int = 1, spare_last: bool = True) -> None:
    """Recompute the activations of the blocks at recomputed_places in the backward pass.

    Same outputs and gradients; once is enough. Goes around what a block's forward is by then (memory/group_offload.py).
    """
    for block in (blocks[i] for i in places_to_recompute(len(blocks), interval, spare_last)):
        if not is_checkpointed(block):
            block.forward = functools.partial(_recompute, block, block.forward)


def store_blocks_(blocks: Sequence[nn.Module]) -> None:
    """Undo checkpoint_blocks_: activations are stored again."""
    for block in blocks:
        if is_checkpointed(block):
            inner = block.__dict__.pop("forward").args[1]
            if getattr(inner, "__self__", None) is not block:  # not the class's own: a wrapper lay within
                block.forward = inner


def is_checkpointed(block: nn.Module) -> bool:
    """Whether checkpoint_blocks_ was here."""
    forward = block.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func is _recompute


class Unread(AbstractContextManager[None]):
    """Meanwhile these layers compute their first token alone and give it for all: autograd saves what it would, of the same shapes.

    Only for a pass whose result nobody reads, but for what autograd saves of it.

    Args:
        layers: Linears, or adapters over them (adapters/layer.py), whose results no gradient reads.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        bases = [getattr(layer, "summed_base", layer) for layer in layers]
        self._bases: list[nn.Module] = [base for base in bases if base is not None]
        self._forwards: list[Any] = []

    def __enter__(self) -> None:
        self._forwards = [base.__dict__.get("forward") for base in self._bases]
        for base in self._bases:
            base.forward = functools.partial(_first_token, base.forward)

    def __exit__(self, *_: object) -> None:
        for base, forward in zip(self._bases, self._forwards, strict=True):
            if forward is None:
                del base.forward
            else:
                base.forward = forward


def unread_layers(block: nn.Module, *args: Any, **kwargs: Any) -> Sequence[nn.Module]:
    """What a block that is called like this need not compute again. Compiled blocks save what their compiler chose: nothing of them."""
    if not hasattr(block, "unread_layers") or getattr(block, "is_compiled", False):
        return ()
    return block.unread_layers(*args, **kwargs)  # pyright: ignore[reportCallIssue]


def _first_token(forward: Any, x: Tensor) -> Tensor:
    """(..., in) -> (..., out), every row the first one's."""
    first = forward(x.flatten(0, -2)[:1])
    return first.expand(x.shape[:-1].numel(), -1).view(*x.shape[:-1], first.shape[-1])


def _recompute(block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    names, count = list(kwargs), len(args)

    def again(*values: Any) -> Any:
        return forward(*values[:count], **dict(zip(names, values[count:], strict=True)))

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), Unread(unread_layers(block, *args, **kwargs))

    # By position: torch keeps tensors among keywords out of reach of hooks on what is saved (memory/activation_offload.py).
    # Nothing in a block draws random numbers, so saving and restoring their state (a device sync) is left out.
    return checkpoint(
        again, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
