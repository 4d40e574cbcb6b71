"""Device selection, device capabilities and memory statistics."""

from __future__ import annotations

import ctypes
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .host import MemoryInUse

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
# Texts of RuntimeErrors: from torch's CPU allocator; from MPS, and from CUDA outside of torch's allocator (pinned
# memory, libraries); from cuBLAS for its workspace.
OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

ALONE = frozenset({"cpu", "mps", "meta"})  # devices without streams; torch.cpu.Stream is only a placeholder


def pick_device(name: str = "") -> torch.device:
    """Return a device by name, or the best available one: CUDA or ROCm, then MPS, then XPU, then the CPU.

    Args:
        name: name of the device, such as "cuda:0"; "" for the best one.
    Raises:
        UserError: the device is not available.
    """
    if name:
        return _open_device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu")
    return torch.device("cpu")


def _open_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError.at("--device", f"{name!r} is not a device; use cpu, cuda, cuda:1, mps or xpu") from error
    try:
        if device.type != "meta":
            torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        available = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
        available += ["mps"] if torch.backends.mps.is_available() else []
        message = f"{name!r} is not available ({reason}); available devices: {', '.join(available)}"
        raise UserError.at("--device", message) from error


def works_beside(device: torch.device) -> bool:
    """Return whether a device runs asynchronously in streams and reads pinned memory: CUDA, ROCm, XPU and similar."""
    return device.type not in ALONE and hasattr(getattr(torch, device.type, None), "Stream")


def module_of(device: torch.device) -> Any:
    """Return the torch module of a device type, such as torch.cuda or torch.xpu; None if there is none."""
    return getattr(torch, device.type, None)


def empty_cache(device: torch.device) -> None:
    """Return unused accelerator memory to the system, for the next phase or another program."""
    if device.type != "cpu" and (empty := getattr(module_of(device), "empty_cache", None)):
        empty()


def empty_pinned(device: torch.device) -> None:
    """Return unused pinned memory to the system.

    Torch caches freed pinned memory. After training with an offloaded base model, the cache can be most of the RAM.
    """
    if not works_beside(device):
        return
    # torch.accelerator.empty_host_cache needs torch 2.11; before, only CUDA had a private function
    empty = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None) or getattr(
        torch._C, "_host_emptyCache", None
    )
    if empty:
        empty()


def trim_heap() -> None:
    """Return freed RAM to the system.

    glibc keeps freed memory in the arenas of its threads: of Chroma at true size, 4.4 GB stayed after a run. Other C
    libraries return it themselves.
    """
    if not sys.platform.startswith("linux"):
        return
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # musl has none
        trim(0)


def as_current(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context manager that makes a device the current one.

    The current device is used where none is given: by pinned memory, for which the driver would otherwise initialize
    another GPU, and by the kernels of other packages.
    """
    if not works_beside(device):
        return nullcontext()
    module = module_of(device)
    return module.device(module.current_device() if device.index is None else device.index)


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device, in bytes; RAM for the CPU and for devices that share it."""
    if works_beside(device):
        module = module_of(device)
        if hasattr(module, "mem_get_info"):
            return int(module.mem_get_info(device)[0])
        return total_bytes(device) - int(module.memory_reserved(device))  # torch.xpu before 2.7
    import psutil  # accelerate brings it

    return int(psutil.virtual_memory().available)


def total_bytes(device: torch.device) -> int:
    """Return the total memory of a device, in bytes; RAM for the CPU and for devices that share it."""
    if works_beside(device):
        return int(module_of(device).get_device_properties(device).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the throughput of a square matrix product, in FLOP per second, as the best of three.

    It is an upper bound of the throughput of a training step.
    """
    edge = 4096 if works_beside(device) else 384
    a = torch.ones(edge, edge, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * edge**3 / best


def _synchronize(device: torch.device) -> None:
    if works_beside(device):
        module_of(device).synchronize(device)


def wait_for_stream(device: torch.device) -> None:
    """Wait until the device has done what was queued in the current stream, such as copies to RAM."""
    if works_beside(device):
        module_of(device).current_stream(device).synchronize()


def memory_in_use(device: torch.device) -> tuple[str, int]:
    """Return ("VRAM", bytes reserved by torch) or ("RAM", bytes of this process).

    There is no host-device synchronization.
    """
    if query := getattr(module_of(device), "memory_reserved", None) if works_beside(device) else None:
        return "VRAM", query(device)
    import psutil  # accelerate brings it

    return "RAM", int(psutil.Process().memory_info().rss)


def measure_memory(device: torch.device) -> MemoryInUse:
    """Return the memory use of this process on a device."""
    memory, used = memory_in_use(device)
    return MemoryInUse(memory, used, peak_vram_bytes(device), total_bytes(device))


def peak_ram_bytes() -> int:
    """Return the peak resident memory of this process, in bytes.

    On Linux from /proc: getrusage also counts the process that started this one, if that was larger.
    """
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows, where psutil knows the peak
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS reports bytes, Linux KiB


def peak_vram_bytes(device: torch.device) -> int:
    """Return the peak memory of tensors on the accelerator since the last reset, in bytes; 0 on the CPU."""
    query = getattr(module_of(device), "max_memory_allocated", None) if works_beside(device) else None
    return query(device) if query else 0


def reset_peak(device: torch.device) -> None:
    """Reset peak_vram_bytes to the current memory, because ComfyUI's process may have sampled before."""
    if works_beside(device) and (reset := getattr(module_of(device), "reset_peak_memory_stats", None)):
        reset(device)


def device_name(device: torch.device) -> str:
    """Return the product name of a device, or its torch name if there is no product name."""
    return module_of(device).get_device_name(device) if works_beside(device) else str(device)


def device_software(device: torch.device) -> str:
    """Return device, torch, driver and library versions, which determine the results of kernels, in one line."""
    parts = [device_name(device), f"torch {torch.__version__}"]
    if device.type == "cuda":
        parts += [f"driver {_driver_version()}", f"cuDNN {torch.backends.cudnn.version()}"]
    return ", ".join(parts)


def _driver_version() -> str:
    try:  # Linux: version of the kernel module, more exact than the CUDA version that the driver supports
        text = Path("/proc/driver/nvidia/version").read_text("utf-8")
        return text.split("Kernel Module", 1)[1].split("  ")[1].strip()
    except (OSError, IndexError, UnicodeDecodeError):
        query = getattr(torch._C, "_cuda_getDriverVersion", None)
        return str(torch.version.hip or (query() if query else "unknown"))


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that a device or the host is out of memory.

    Some allocators raise a plain RuntimeError, which is recognized by its text.
    """
    return isinstance(error, OUT_OF_MEMORY) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
    )
