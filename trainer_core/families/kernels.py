"""Which kernels compute: attention by name, and blocks compiled one by one."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..problems import reason_of
from .joint_attention import Attend, attend

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CPU_COMPILERS = ("g++", "clang++", "cl")


def attention(name: str) -> Attend:
    """Attention by this kernel; "native" lets torch choose.

    Batches of prompts of different lengths need a mask, which flash kernels don't take: torch chooses for those.
    """
    if name == "native":
        return attend
    backend = BACKENDS[name]

    def by_name(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            return attend(query, key, value, mask)
        with sdpa_kernel(backend):
            return attend(query, key, value, None)

    return by_name


def attention_fault(name: str, device: torch.device, dtype: torch.dtype, width: int = 128) -> str:
    """'' where this kernel computes outputs and gradients on this device; else why not. Tried on two tokens.

    Args:
        width: of a head; 128 in Chroma and Flux.
    """
    if name == "native":
        return ""
    try:
        with torch.enable_grad():
            query = torch.zeros(1, 1, 2, width, device=device, dtype=dtype, requires_grad=True)
            attention(name)(query, query, query, None).sum().backward()
    except RuntimeError as error:
        return f"{name} attention does not run on {device} in {str(dtype).removeprefix('torch.')} ({reason_of(error)})"
    return ""


def set_attention_(transformer: nn.Module, name: str) -> int:
    """Let every attention of the model compute by this kernel. Returns how many there are."""
    found, kernel = attention_modules(transformer), attention(name)
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
