"""Which accelerator, picked by what it can do, and how much memory the run took."""

from __future__ import annotations

import sys
import time

import torch

from .problems import UserError


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


def empty_cache(device: torch.device) -> None:
    """Give freed accelerator memory back to the system, so that the next phase or another program can have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Memory that is free there now; RAM for a CPU and for devices that share it, 0 where it can't be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # accelerate brings it

    return int(psutil.virtual_memory().available)


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of square matrices, the best of three: what a step can't exceed."""
    edge = 4096 if device.type == "cuda" else 384
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_ram_bytes() -> int:
    """Peak resident memory of this process so far."""
    if sys.platform == "win32":
        return _peak_windows_bytes()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def peak_vram_bytes(device: torch.device) -> int:
    """Peak memory of tensors on the accelerator since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


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
