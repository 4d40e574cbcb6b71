"""Which accelerator, picked by what it can do, what it can do, and how much memory the run took."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
# In RuntimeErrors: of torch's CPU allocator; of MPS, and of CUDA beside torch's allocator (pinned memory, libraries); of cuBLAS' workspace.
SAID = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

ALONE = frozenset({"cpu", "mps", "meta"})  # have no streams: torch.cpu.Stream only looks like one


def pick_device(wanted: str = "") -> torch.device:
    """The wanted device, or the best there is: CUDA or ROCm, then MPS, then XPU, then the CPU.

    Raises:
        UserError: the wanted one is not here.
    """
    if wanted:
        return _device(wanted)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu")
    return torch.device("cpu")


def _device(wanted: str) -> torch.device:
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError.at("--device", f"{wanted!r} is no device; write cpu, cuda, cuda:1, mps or xpu") from error
    try:
        if device.type != "meta":
            torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        here = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        message = f"{wanted!r} can't be used ({reason}); this machine has {', '.join(here)}"
        raise UserError.at("--device", message) from error


def works_beside(device: torch.device) -> bool:
    """Whether it works beside the host, in streams, and reads pinned memory by itself: CUDA, ROCm, XPU and what else is made like them."""
    return device.type not in ALONE and hasattr(getattr(torch, device.type, None), "Stream")


def module_of(device: torch.device) -> Any:
    """torch.cuda, or what stands in its place for a device of another kind."""
    return getattr(torch, device.type, None)


def empty_cache(device: torch.device) -> None:
    """Give freed accelerator memory back to the system, so that the next phase or another program can have it."""
    if device.type != "cpu" and (empty := getattr(module_of(device), "empty_cache", None)):
        empty()


def empty_pinned(device: torch.device) -> None:
    """Give freed pinned memory back as well. Torch keeps it for the next that wants some, and a base that trained from there can be
    all the RAM that another program needs."""
    if not works_beside(device):
        return
    # torch.accelerator has it since 2.11; before, torch had it for CUDA alone
    empty = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None) or getattr(
        torch._C, "_host_emptyCache", None
    )
    if empty:
        empty()


def as_current(device: torch.device) -> AbstractContextManager[Any]:
    """Meanwhile it is the one that is meant where none is named: by pinned memory, whose driver would wake another GPU, and by packages' kernels."""
    if not works_beside(device):
        return nullcontext()
    module = module_of(device)
    return module.device(module.current_device() if device.index is None else device.index)


def free_bytes(device: torch.device) -> int:
    """Memory that is free there now; RAM for a CPU and for devices that share it, 0 where it can't be told."""
    if works_beside(device):
        module = module_of(device)
        if hasattr(module, "mem_get_info"):
            return int(module.mem_get_info(device)[0])
        return total_bytes(device) - int(module.memory_reserved(device))  # torch.xpu before 2.7
    import psutil  # accelerate brings it

    return int(psutil.virtual_memory().available)


def total_bytes(device: torch.device) -> int:
    """Memory that there is, free or not; RAM for a CPU and for devices that share it."""
    if works_beside(device):
        return int(module_of(device).get_device_properties(device).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of square matrices, the best of three: what a step can't exceed."""
    edge = 4096 if works_beside(device) else 384
    a = torch.ones(edge, edge, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        _wait(device)
        began = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * edge**3 / best


def _wait(device: torch.device) -> None:
    if works_beside(device):
        module_of(device).synchronize(device)


def memory_in_use(device: torch.device) -> tuple[str, int]:
    """("VRAM", bytes that torch holds there), or ("RAM", what this process holds). Asks the device nothing."""
    if asked := getattr(module_of(device), "memory_reserved", None) if works_beside(device) else None:
        return "VRAM", asked(device)
    import psutil  # accelerate brings it

    return "RAM", int(psutil.Process().memory_info().rss)


def peak_ram_bytes() -> int:
    """Peak resident memory of this process so far."""
    if sys.platform == "win32":
        return _peak_windows_bytes()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def peak_vram_bytes(device: torch.device) -> int:
    """Peak memory of tensors on the accelerator since the last reset; 0 on a CPU."""
    asked = getattr(module_of(device), "max_memory_allocated", None) if works_beside(device) else None
    return asked(device) if asked else 0


def reset_peak(device: torch.device) -> None:
    """Let peak_vram_bytes begin with what is there now: ComfyUI's process may have drawn before."""
    if works_beside(device) and (reset := getattr(module_of(device), "reset_peak_memory_stats", None)):
        reset(device)


def device_name(device: torch.device) -> str:
    """As its maker calls it, where that can be told."""
    return module_of(device).get_device_name(device) if works_beside(device) else str(device)


def device_software(device: torch.device) -> str:
    """Device, driver and libraries that decide what its kernels compute, in one line."""
    parts = [device_name(device), f"torch {torch.__version__}"]
    if device.type == "cuda":
        parts += [f"driver {_driver_version()}", f"cuDNN {torch.backends.cudnn.version()}"]
    return ", ".join(parts)


def _driver_version() -> str:
    try:  # Linux: the kernel module's own, more exact than the version of CUDA that it offers
        text = Path("/proc/driver/nvidia/version").read_text("utf-8")
        return text.split("Kernel Module", 1)[1].split("  ")[1].strip()
    except (OSError, IndexError, UnicodeDecodeError):
        asked = getattr(torch._C, "_cuda_getDriverVersion", None)
        return str(torch.version.hip or (asked() if asked else "unknown"))


def _peak_windows_bytes() -> int:
    import ctypes
    from ctypes import wintypes

    class Counters(ctypes.Structure):
        _fields_ = [("cb", wintypes.DWORD), ("PageFaultCount", wintypes.DWORD)] + [
            (name, ctypes.c_size_t)
            for name in (
                "PeakWorkingSetSize", "WorkingSetSize", "QuotaPeakPagedPoolUsage", "QuotaPagedPoolUsage",
                "QuotaPeakNonPagedPoolUsage", "QuotaNonPagedPoolUsage", "PagefileUsage", "PeakPagefileUsage",
            )
        ]  # fmt: skip

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]
    psapi = ctypes.WinDLL("psapi")  # type: ignore[attr-defined]
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    psapi.GetProcessMemoryInfo(wintypes.HANDLE(kernel.GetCurrentProcess()), ctypes.byref(counters), counters.cb)
    return int(counters.PeakWorkingSetSize)


def is_out_of_memory(error: Exception) -> bool:
    """Of a device, or of the host: not all allocators have an error of their own."""
    return isinstance(error, OUT_OF_MEMORY) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)
    )
