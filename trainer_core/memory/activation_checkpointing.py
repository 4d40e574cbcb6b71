"""Activation checkpointing per block: activations inside a block are recomputed in the backward pass.

diffusers' own implementation drops Chroma's mask in single blocks (the LoRA gradient is off by 0.58 relative, diffusers
0.42.1). We therefore wrap the blocks ourselves and pass on all of their arguments.

Only what gradients read is recomputed. The matrix products at the end of a block are gated and added to its input, and
no gradient reads them. The recomputation skips them: five twelfths of a single block's products, a third of a double
block's. The last block is not recomputed at all: the backward pass starts with it, so recomputing would hold the same
activations at the same time (docs/decisions/0020).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INTERVALS = (64, 8, 4, 3, 2, 1)  # checkpointing intervals, fastest first


def places_to_recompute(num_blocks: int, interval: int = 1, spare_last: bool = True) -> range:
    """Return the indices of the blocks that checkpoint_blocks_ recomputes: every `interval`-th, from the first.
    Args:
        num_blocks: Number of blocks.
        interval: Distance between recomputed blocks.
        spare_last: Don't recompute the last block. Set to False if weights or activations are offloaded, because the
            activations that the last block stores would then have to be brought back.
    """
    return range(0, num_blocks - spare_last, interval)


def checkpoint_blocks_(blocks: Sequence[nn.Module], interval: int = 1, spare_last: bool = True) -> None:
    """Recompute the activations of the blocks at places_to_recompute in the backward pass.

    Outputs and gradients are unchanged. Repeated calls have no effect. Wraps the current forward of each block, so call
    it after memory/group_offload.py, and before models/attention_backends.py: compile_blocks_.
    """
    is_compiled = any(hasattr(block.forward, "_torchdynamo_orig_callable") for block in blocks)
    assert not is_compiled, "blocks are compiled last: a checkpoint around compiled code computes everything again"
    for block in (blocks[i] for i in places_to_recompute(len(blocks), interval, spare_last)):
        if not is_checkpointed(block):
            block.forward = functools.partial(_recompute, block, block.forward)


def store_blocks_(blocks: Sequence[nn.Module]) -> None:
    """Undo checkpoint_blocks_: store activations again."""
    for block in blocks:
        if is_checkpointed(block):
            inner = block.__dict__.pop("forward").args[1]
            if getattr(inner, "__self__", None) is not block:  # an inner wrapper, not the class's own forward
                block.forward = inner


def is_checkpointed(block: nn.Module) -> bool:
    """Return whether checkpoint_blocks_ wrapped the block."""
    forward = block.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func is _recompute


class Unread(AbstractContextManager[None]):
    """Context manager in which layers compute only their first token and return it for all tokens.

    Autograd saves tensors of the same shapes as it would otherwise. Use it only for a forward pass whose outputs are
    not used, but for what autograd saves.

    Args:
        layers: Linear layers, or adapters of them (adapters/layer.py), whose outputs no gradient reads.
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
    """Return the layers of a block that need not be recomputed when it is called with these arguments."""
    if not hasattr(block, "unread_layers"):
        return ()
    return block.unread_layers(*args, **kwargs)  # pyright: ignore[reportCallIssue]


def _first_token(forward: Any, x: Tensor) -> Tensor:
    """Map (..., in) to (..., out) where every row is the first one's output."""
    first = forward(x.flatten(0, -2)[:1])
    return first.expand(x.shape[:-1].numel(), -1).view(*x.shape[:-1], first.shape[-1])


def _recompute(block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    names, count = list(kwargs), len(args)

    def call(*values: Any) -> Any:
        return forward(*values[:count], **dict(zip(names, values[count:], strict=True)))

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), Unread(unread_layers(block, *args, **kwargs))

    if torch.compiler.is_compiling():  # the compiler leaves out what nothing reads
        return checkpoint(call, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=False)
    # Pass keyword arguments by position: torch hides tensors in keyword arguments from the hooks on saved tensors
    # (memory/activation_offload.py). Blocks draw no random numbers, so saving and restoring the random state (a device
    # synchronization) is not needed.
    return checkpoint(call, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
