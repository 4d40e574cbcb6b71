"""Attention kernels for sampling: the one used in training, torch's own, or SageAttention's."""

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
# Maximum relative error on 128 random tokens. 8-bit kernels have an error of about 0.02, a broken one of 1 or NaN.
LARGEST_ERROR = 0.2


@contextmanager
def use_attention(transformer: nn.Module, name: str) -> Iterator[None]:
    """Context manager in which all attention of the model uses this kernel. Restores the previous kernels on exit."""
    if name == "same":
        yield
        return
    modules = attention_modules(transformer)
    original_kernels = [module.__dict__["attend"] for module in modules]
    try:
        for module in modules:
            module.__dict__["attend"] = attend if name == "native" else sage_attention()
        yield
    finally:
        for module, kernel in zip(modules, original_kernels, strict=True):
            module.__dict__["attend"] = kernel


@cache
def sage_attention() -> Attend:
    """Return the SageAttention function, excluded from compilation.

    Always the same function object: compiled blocks would be recompiled for another one.
    """
    return torch.compiler.disable(attend_by_sage)  # pyright: ignore[reportReturnType]


def attend_by_sage(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax(query key^T / sqrt(width)) value, with queries and keys in 8 bits.

    Uses torch's attention if there is a mask, which SageAttention does not support. There is no backward pass:
    gradients would silently be missing or wrong.

    Source: Zhang et al. 2024, arXiv:2410.02367.
    """
    assert not torch.is_grad_enabled(), "SageAttention has no backward pass; use it only for sampling"
    assert not torch.is_grad_enabled(), "sage attention is for drawing alone"
    if mask is not None:
        return attend(query, key, value, mask)
    sage = importlib.import_module("sageattention")
    return sage.sageattn(query, key, value, tensor_layout="HND", is_causal=False)


def drawing_problems(settings: ValidationConfig | None, device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """Return the problem if the attention kernel of the settings can't run on this machine. dtype: the model's."""
    if settings is None or settings.attention != "sage":
        return []
    if problems := missing_for_drawing(settings):
        return problems
    fault = sage_fault(device, dtype)
    return [Problem("attention", f"sage: {fault}; use same")] if fault else []


def sage_fault(device: torch.device, dtype: torch.dtype, width: int = 128) -> str:
    """Return why SageAttention is missing or inaccurate on this device, or ''. Runs a forward pass on a few tokens.

    Args:
        device: The device.
        dtype: The model's dtype.
        width: Width of a head; 128 in Chroma and Flux.
    """
    if device.type != "cuda":
        return f"needs a CUDA device; this run's is {device}"
    return try_kernel(device, dtype, width)


def try_kernel(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """The test of sage_fault, for any device."""
    source = generator(0, "attention")
    query, key, value = torch.randn(3, 1, 1, TRIED_TOKENS, width, generator=source).to(device, dtype)
    where = f"on {device} in {str(dtype).removeprefix('torch.')}"
    try:
        with torch.no_grad():
            output = attend_by_sage(query, key, value, None).float()
    except Exception as error:  # packages that compile on the first call raise errors of any type
        return f"does not run {where} ({reason_of(error)})"
    reference = attend(query.float(), key.float(), value.float(), None)
    error = float((output - reference).norm() / reference.norm())
    return "" if error <= LARGEST_ERROR else f"is inaccurate {where}: the relative error is {error:.2g}"
