"""The machine that a plan is for."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..devices import device_name, free_bytes, product_flops
from ..families.weights import DTYPES
from .plan import GB, Machine


def this_machine(device: torch.device, dtype: str) -> Machine:
    """The device and what is free there now; its speed by one product of matrices."""
    flops = product_flops(device, DTYPES[dtype])
    free, ram = free_bytes(device), free_bytes(torch.device("cpu"))
    return Machine(device_name(device), 0 if device.type == "cpu" else free, ram, flops)


def named_machine(here: Machine, vram_gb: float, ram_gb: float) -> Machine:
    """This machine with other amounts of memory; 0 leaves what is free here. Of another device the speed is not known."""
    if vram_gb:
        here = Machine(f"{vram_gb:g} GB", int(vram_gb * GB), here.ram_bytes)
    return replace(here, ram_bytes=int(ram_gb * GB)) if ram_gb else here
