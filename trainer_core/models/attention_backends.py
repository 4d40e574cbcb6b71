"""Attention kernels selected by name, and per-block compilation."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .mmdit_layers import Attend, attend

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CPU_COMPILERS = ("g++", "clang++", "cl")


def attention(name: str, masked: str = "native") -> Attend:
    """Return an attention function that uses these kernels.

    Args:
        name: Kernel for calls without a mask: a key of BACKENDS, or "native" to let torch choose.
        masked: Kernel for calls with a mask (a batch of prompts of different lengths). Flash kernels on GPUs don't
            support masks.
    """
    if name == masked == "native":
        return attend

    def attend_by_name(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        kernel = name if mask is None else masked
        if kernel == "native":
            return attend(query, key, value, mask)
        with sdpa_kernel(BACKENDS[kernel]):
            return attend(query, key, value, mask)

    return attend_by_name


def set_attention_(transformer: nn.Module, name: str, masked: str = "native") -> int:
    """Make every attention module of the model use these kernels. Return the number of modules."""
    modules, kernel = attention_modules(transformer), attention(name, masked)
    for module in modules:
        module.__dict__["attend"] = kernel  # one function for all: torch.compile recompiles for each new function
    return len(modules)


def attention_modules(transformer: nn.Module) -> list[nn.Module]:
    """Return the modules that have an `attend` function."""
    return [module for module in transformer.modules() if "attend" in module.__dict__]


def compiler_fault(device: torch.device) -> str:
    """Return what torch.compile lacks for this device, or '' if nothing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed (on Windows: pip install triton-windows)"
    if device.type == "cpu" and not any(map(shutil.which, CPU_COMPILERS)):
        return f"no C++ compiler is found ({', '.join(CPU_COMPILERS)})"
    if device.type not in ("cuda", "cpu", "xpu"):
        return f"torch.compile does not support {device.type} well enough"
    return ""


def compile_blocks_(
    blocks: Iterable[nn.Module], backend: str = "inductor", options: dict[str, Any] | None = None
) -> None:
    """Compile each block's forward with dynamic sequence lengths.

    Blocks of one class share their code, so each class is compiled once. Call this after checkpoint_blocks_: with the
    checkpoint inside what is compiled, the compiler leaves out of the recomputation what no gradient reads, and fuses
    the rest (27 to 31 % less time than a checkpoint around compiled blocks, on a CPU). Results differ in their last
    bits, because operations are fused.

    Args:
        options: Of torch.compile. CUDA graphs are among them; why no run sets them: docs/decisions/0105.
    """
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True, backend=backend, options=options)
