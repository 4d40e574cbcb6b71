"""Attention kernels at real shapes: those that a run may choose from, and what the old blocks handed cuDNN's."""

from __future__ import annotations

from typing import Any

import torch
from chroma_trainer.trainer_core.models.attention_backends import attention
from chroma_trainer.trainer_core.models.attention_check import AttentionShape, kernel_fault
from chroma_trainer.trainer_core.train.attention_choice import WITHOUT_MASK
from context import Context, Finding
from machine import best_seconds
from torch import Tensor

SHAPES = tuple(
    AttentionShape(batch, text, image, 24, 128) for text, image in ((80, 1024), (81, 4096)) for batch in (1, 2)
)
TINY = (AttentionShape(1, 5, 16, 2, 32), AttentionShape(2, 6, 64, 2, 32))
MUST_BE_RIGHT = {
    "cuda": ("flash", "efficient", "math"),
    "cpu": ("math",),
}  # cuDNN's may be wrong: the product leaves it out then
OLD_ROWS = 5  # a single block joins attention with the feed-forward, four times as wide


def show_kernel(context: Context, kernel: str) -> Finding:
    """Its fault at every shape, masked and not, and the seconds of a forward and a backward pass."""
    dtype, found = torch.bfloat16, dict[str, Any]()
    for shape in context.pick(SHAPES, TINY):
        for masked in (False,) if kernel in WITHOUT_MASK else (False, True):
            name = f"{shape}{', masked' if masked else ''}"
            found[name] = {"fault": kernel_fault(kernel, shape, context.device, dtype, masked)}
            if not found[name]["fault"] and not masked:
                found[name]["seconds"] = best_seconds(context.device, _pass_of(kernel, shape, context.device, dtype))
            context.tell({"shapes": found})
    faults = [f"{name}: {entry['fault']}" for name, entry in found.items() if entry["fault"]]
    is_fault = bool(faults) and kernel in MUST_BE_RIGHT.get(context.device.type, ())
    told = (
        f"{len(faults)} of {len(found)} shapes wrong ({faults[0]})" if faults else f"right at all {len(found)} shapes"
    )
    return Finding(f"{kernel}: {told}", {"shapes": found}, faults if is_fault else [])


def _pass_of(kernel: str, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> Any:
    """One forward and one backward pass over random numbers with the strides that blocks hand over."""
    query, key, value, gradient = _heads_of(shape, device, dtype)
    attend = attention(kernel, masked=kernel)

    def both() -> None:
        torch.autograd.grad(attend(query, key, value, None), (query, key, value), gradient)

    return both


def _heads_of(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and gradient: (B, heads, tokens, head width), strides of (B, tokens, heads, head width)."""
    size = shape.batch, shape.text + shape.image, shape.heads, shape.head_width
    draw = torch.Generator(device).manual_seed(0)
    found = [torch.randn(size, generator=draw, device=device).to(dtype).transpose(1, 2) for _ in range(4)]
    return [tensor.requires_grad_() for tensor in found[:3]] + found[3:]


def show_old_slice(context: Context) -> Finding:
    """Backward passes that are handed a gradient as autograd's own concatenation gave it: rows five widths apart.

    The expected finding is that cuDNN's kernel is right for the contiguous gradient alone. It comes last, for it may
    break the device.
    """
    shape = context.pick(SHAPES[0], TINY[0])
    query, key, value, gradient = _heads_of(shape, context.device, torch.bfloat16)
    wide = torch.zeros(
        *gradient.transpose(1, 2).flatten(2).shape[:2], OLD_ROWS * shape.heads * shape.head_width, device=context.device
    )
    wide = wide.to(gradient.dtype)
    old = wide[..., : shape.heads * shape.head_width]
    old.copy_(gradient.transpose(1, 2).flatten(2))
    handed = {"contiguous": gradient, "slice": old.unflatten(2, (shape.heads, -1)).transpose(1, 2)}
    right = _gradients_by("math", query, key, value, gradient)
    found: dict[str, Any] = {"strides": {name: list(tensor.stride()) for name, tensor in handed.items()}}
    for kernel in ("native", "flash", "efficient", "cudnn"):  # the first is the product's own choice without a check
        for name, tensor in handed.items():
            found[f"{kernel}, {name}"] = _error(
                lambda kernel=kernel, tensor=tensor: _gradients_by(kernel, query, key, value, tensor), right
            )
            context.tell(found)
    told = ", ".join(f"{name}: {value}" for name, value in found.items() if name.startswith("cudnn"))
    return Finding(f"{told} (a fault with the slice is what was expected)", found)


def _gradients_by(kernel: str, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> list[Tensor]:
    result = attention(kernel)(query, key, value, None)
    return [found.float() for found in torch.autograd.grad(result, (query, key, value), gradient)]


def _error(call: Any, right: list[Tensor]) -> str:
    """How far off the worst of the gradients is, or what happened instead."""
    try:
        off = max(float((ours - exact).norm() / exact.norm()) for ours, exact in zip(call(), right, strict=True))
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    return f"off by {off:.2g}" if off == off else "not finite"
