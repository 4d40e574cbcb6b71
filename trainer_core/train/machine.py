"""The machine that a plan is for."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..devices import device_name, free_bytes, product_flops, total_bytes
from ..models.loading.weights import DTYPES
from ..planner.memory_plan import GB, Machine


def this_machine(device: torch.device, dtype: str) -> Machine:
    """The device and what is free there now; its speed by one product of matrices."""
    flops = product_flops(device, DTYPES[dtype])
    cpu = torch.device("cpu")
    free, total = (0, 0) if device.type == "cpu" else (free_bytes(device), total_bytes(device))
    return Machine(device_name(device), free, free_bytes(cpu), flops, total, total_bytes(cpu))


def named_machine(here: Machine, vram_gb: float, ram_gb: float) -> Machine:
    """This machine with other amounts of memory; 0 leaves what is free here. Of another device the speed is not known."""
    if vram_gb:
        size = int(vram_gb * GB)
        here = Machine(f"{vram_gb:g} GB", size, here.ram_bytes, device_total=size, ram_total=here.ram_total)
    return replace(here, ram_bytes=int(ram_gb * GB), ram_total=int(ram_gb * GB)) if ram_gb else here
