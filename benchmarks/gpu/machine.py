"""Which device, which software, and what the device reaches: the header of gpu.json."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from chroma_trainer.trainer_core.devices import device_name, device_software, module_of, total_bytes, works_beside
from context import Context, Finding
from models import hardware

PACKAGES = (
    "triton",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "diffusers",
    "optimum-quanto",
    "bitsandbytes",
    "torchao",
)
EDGE, ROUNDS, REPEATS = 8192, 3, 10
COPIED = 4 << 30  # bytes


def describe(context: Context) -> Finding:
    """Names, versions, and the best of a few rounds of one large product and one large copy."""
    device = context.device
    if device.type == "cpu" and not context.is_rehearsal:
        return Finding("", faults=["there is no GPU that torch can use"])
    flops = product_flops(device, context.pick(EDGE, 256))
    bandwidth = copied_bytes(device, context.pick(COPIED, 8 << 20))
    software = device_software(device)
    driver = re.search(r"driver ([^,]+)", software)
    header: dict[str, Any] = {
        "device": device_name(device), "memory_gb": round(total_bytes(device) / 1e9, 1),
        "driver": driver[1] if driver else None, "torch": torch.__version__, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if context.is_cuda else None, "triton": version_of("triton"),
        "packages": {name: version_of(name) for name in PACKAGES}, "python": platform.python_version(),
        "capability": list(torch.cuda.get_device_capability(device)) if context.is_cuda else None,
        "hardware": hardware(), "cores": os.cpu_count(), "ram_gb": round(total_bytes(torch.device("cpu")) / 1e9, 1),
        "bf16_flops": flops, "bf16_tflops": round(flops / 1e12, 3), "bandwidth_gb_a_second": round(bandwidth / 1e9, 1),
    }  # fmt: skip
    return Finding(
        f"{header['device']}, torch {header['torch']}: {flops / 1e12:.3g} TFLOP/s in bf16, {bandwidth / 1e9:.4g} GB/s",
        {"header": header},
    )


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def product_flops(device: torch.device, edge: int) -> float:
    """FLOP/s of a product of two square matrices in bf16. Of random numbers: ones heat a GPU less."""
    a, b = (torch.randn(edge, edge, device=device).to(torch.bfloat16) for _ in "ab")
    return 2 * edge**3 / best_seconds(device, lambda: torch.mm(a, b))


def copied_bytes(device: torch.device, size: int) -> float:
    """Bytes a second that are read and written."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(device, lambda: target.copy_(source))


def best_seconds(device: torch.device, call: Callable[[], Any]) -> float:
    """Of one call, in the best of a few rounds."""
    found = float("inf")
    for _ in range(ROUNDS + 1):  # the first wakes it up
        wait(device)
        began = time.perf_counter()
        for _ in range(REPEATS):
            call()
        wait(device)
        found = min(found, (time.perf_counter() - began) / REPEATS)
    return found


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if works_beside(device):
        module_of(device).synchronize(device)


def peak_reserved_bytes(device: torch.device) -> int:
    """What torch's allocator held at most since the last reset, idle or not; 0 where it can't be told."""
    asked = getattr(module_of(device), "max_memory_reserved", None) if works_beside(device) else None
    return int(asked(device)) if asked else 0
