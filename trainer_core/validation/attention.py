"""The attention kernel that pictures are drawn with: as in training, torch's own, or SageAttention's."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from ..config.validation import ValidationConfig
from ..errors import Problem, reason_of
from ..models.attention_backends import attention_modules
from ..models.mmdit_layers import Attend, attend
from ..quant.packages import missing_for_drawing
from ..seeds import generator

TRIED_TOKENS = 128
LARGEST_ERROR = (
    0.2  # of 128 random tokens, as a share: 8-bit kernels are meant to be off by some 0.02, a broken one by 1 or NaN
)


@contextmanager
def use_attention(transformer: nn.Module, name: str) -> Iterator[None]:
    """While it lasts every attention of the model computes by this kernel; afterwards, or after a fault, by its own again."""
    if name == "same":
        yield
        return
    modules = attention_modules(transformer)
    before = [module.__dict__["attend"] for module in modules]
    try:
        for module in modules:
            module.__dict__["attend"] = attend if name == "native" else sage_attention()
        yield
    finally:
        for module, kernel in zip(modules, before, strict=True):
            module.__dict__["attend"] = kernel


@cache
def sage_attention() -> Attend:
    """Always the same function: compiled blocks would be compiled again for another. What it calls is not compiled."""
    return torch.compiler.disable(attend_by_sage)  # pyright: ignore[reportReturnType]


def attend_by_sage(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(query key^T / sqrt(width)) value with queries and keys in 8 bits; torch's own where there is a mask, which it can't take.

    It has no backward pass: gradients through it would be missing, or wrong, without a word.

    Source: Zhang et al. 2024, arXiv:2410.02367.
    """
    assert not torch.is_grad_enabled(), "sage attention is for drawing alone"
    if mask is not None:
        return attend(query, key, value, mask)
    sage = importlib.import_module("sageattention")
    return sage.sageattn(query, key, value, tensor_layout="HND", is_causal=False)


def drawing_problems(settings: ValidationConfig | None, device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """The kernel of the settings, where it can't draw on this machine. dtype: the model's."""
    if settings is None or settings.attention != "sage":
        return []
    if found := missing_for_drawing(settings):
        return found
    fault = sage_fault(device, dtype)
    return [Problem("attention", f"sage: {fault}; use same")] if fault else []


def sage_fault(device: torch.device, dtype: torch.dtype, width: int = 128) -> str:
    """'' where SageAttention computes what attention is, near enough, on this device; else why not. Tried on a few tokens, forward alone.

    Args:
        width: of a head; 128 in Chroma and Flux.
    """
    if device.type != "cuda":
        return f"needs a CUDA device; this run's is {device}"
    return try_kernel(device, dtype, width)


def try_kernel(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """sage_fault's trial, on any device."""
    draw = generator(0, "attention")
    query, key, value = torch.randn(3, 1, 1, TRIED_TOKENS, width, generator=draw).to(device, dtype)
    where = f"on {device} in {str(dtype).removeprefix('torch.')}"
    try:
        with torch.no_grad():
            found = attend_by_sage(query, key, value, None).float()
    except Exception as error:  # a package that compiles when it is called ends in errors of every kind
        return f"does not run {where} ({reason_of(error)})"
    wanted = attend(query.float(), key.float(), value.float(), None)
    error = float((found - wanted).norm() / wanted.norm())
    return "" if error <= LARGEST_ERROR else f"is wrong {where}: off by {error:.2g} of attention's size"
