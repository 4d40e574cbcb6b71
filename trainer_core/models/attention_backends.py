"""Which kernels compute: attention by name, and blocks compiled one by one."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable

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
    """Attention by these kernels; "native" lets torch choose.

    Args:
        masked: where there is a mask (a batch of prompts of different lengths), which flash kernels on GPUs don't take.
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
    """Let every attention of the model compute by these kernels. Returns how many there are."""
    found, kernel = attention_modules(transformer), attention(name, masked)
    for module in found:
        module.__dict__["attend"] = kernel  # one for all: each other function would be compiled anew
    return len(found)


def attention_modules(transformer: nn.Module) -> list[nn.Module]:
    """Those whose `attend` computes attention."""
    return [module for module in transformer.modules() if "attend" in module.__dict__]


def compiler_fault(device: torch.device) -> str:
    """'' where torch.compile finds what it needs for this device, else what is missing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed (on Windows: pip install triton-windows)"
    if device.type == "cpu" and not any(map(shutil.which, CPU_COMPILERS)):
        return f"no C++ compiler is found ({', '.join(CPU_COMPILERS)})"
    if device.type not in ("cuda", "cpu", "xpu"):
        return f"torch.compile does not support {device.type} well enough"
    return ""


def compile_blocks_(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile each block's forward, with lengths that may change.

    Blocks of one kind share their code, so each kind is compiled once, not each block. Call it before
    checkpoint_blocks_, which goes around what is compiled. Numbers change in their last bits: operations are fused.
    """
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True, backend=backend)
        block.__dict__["is_compiled"] = True
