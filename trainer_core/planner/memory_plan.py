"""The estimate of a run, as data and in words: memory by phase, disk and time, and whether it fits a machine.

Device figures are bytes of tensors, as torch.cuda.max_memory_allocated counts them. DEVICE_OVERHEAD and DEVICE_GAPS are
added to decide whether they fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..devices import DTYPES, device_name, free_bytes, product_flops, total_bytes

GB = 1_000_000_000
SOLD_GB = 1 << 30
# Device memory besides tensors: the driver's context, library workspaces, and fragmentation in the allocator. Assumed,
# not measured here.
DEVICE_OVERHEAD, DEVICE_GAPS = 700_000_000, 0.04


@dataclass(frozen=True)
class Machine:
    """A machine that a run is estimated for.

    Args:
        name: name of its accelerator or processor.
        device_bytes: free memory of the accelerator, 0 for a CPU run.
        ram_bytes: free RAM.
        flops: operations per second, 0 where unknown.
        device_total: total memory of the accelerator.
        ram_total: total RAM.
    """

    name: str
    device_bytes: int
    ram_bytes: int
    flops: float = 0.0
    device_total: int = 0
    ram_total: int = 0

    def shared_by(self, count: int) -> Machine:
        """Return what each of several processes has of this machine: a device of its own, and its share of the RAM."""
        return replace(self, ram_bytes=self.ram_bytes // count, ram_total=self.ram_total // count)


@dataclass(frozen=True)
class PhasePlan:
    """Estimate of one phase."""

    name: str
    device: int  # peak bytes of tensors on the device
    ram: int  # peak bytes of the process in RAM
    seconds: float | None = None  # None where unknown


@dataclass(frozen=True)
class MemoryPlan:
    """The estimate of one request on one machine."""

    phases: tuple[PhasePlan, ...]
    disk: dict[str, int]  # bytes by kind of file
    machine: Machine
    settings: str  # the settings that decide the figures, in words
    flops_per_step: int
    seconds_per_step: float | None
    suggestion: Callable[[], str] = lambda: ""  # what would fit, computed on demand
    choice: str = ""  # why mode auto did not choose faster settings, in one line
    is_sampled_alone: bool = False  # another model samples images, and the trained one is in RAM meanwhile

    @property
    def device_peak(self) -> int:
        return max(phase.device for phase in self.phases)

    @property
    def ram_peak(self) -> int:
        return max(phase.ram for phase in self.phases)

    def unfit(self) -> list[PhasePlan]:
        """Return the phases that need more memory than the machine has."""
        room = self.machine
        return [
            phase
            for phase in self.phases
            if (room.device_bytes and bytes_to_reserve(phase.device) > room.device_bytes)
            or (room.ram_bytes and phase.ram > room.ram_bytes)
        ]

    def on_devices(self, count: int, accumulation: int, machine: Machine, is_sharded: bool = False) -> MemoryPlan:
        """Return the estimate of several processes on one machine, from that of one of them.

        Args:
            count: number of processes, each with a device of its own.
            accumulation: micro-batches of a step, which they share out.
            machine: the machine; its RAM is that of all processes.
            is_sharded: they share out the weights, and compute images together.
        """
        share = -(-accumulation // count) / accumulation  # of the slowest process
        shares = {"train": share, "text": 1 / count, "latents": 1 / count}
        shares |= {} if is_sharded else {"eval": 1 / count, "validate": 1 / count}
        phases = tuple(
            replace(phase, ram=count * phase.ram, seconds=phase.seconds and phase.seconds * shares.get(phase.name, 1.0))
            for phase in self.phases
        )
        step = self.seconds_per_step and self.seconds_per_step * share
        has = "its share" if is_sharded else "all"
        settings = f"{self.settings}; {count} processes, each with {has} of the model: {count} x the RAM of one"
        return replace(self, phases=phases, machine=machine, seconds_per_step=step, settings=settings)

    def first_line(self) -> str:
        """Return the estimate in one line: the memory that the largest phases need, and how much is free."""
        room = self.machine
        fits = "fits" if not self.unfit() else f"does not fit ({', '.join(phase.name for phase in self.unfit())})"
        most = max(self.phases, key=lambda phase: phase.ram)
        has = f" of {gb(room.ram_bytes)} free" if room.ram_bytes else ""
        needs = f"RAM {gb(most.ram)}{has} ({most.name})"
        if room.device_bytes:
            worst = max(self.phases, key=lambda phase: phase.device)
            needs = f"VRAM {gb(bytes_to_reserve(worst.device))} of {gb(room.device_bytes)} free ({worst.name}), {needs}"
        # Seconds come from the speed of one matrix product, so they are a lower bound.
        speed = f", at least {duration(self.seconds_per_step)} a step" if self.seconds_per_step else ""
        return f"plan: {fits}; {needs}, disk {gb(sum(self.disk.values()))}{speed}"

    def text(self) -> str:
        """Return the estimate as a table."""
        where = "on the device" if self.machine.device_bytes else "tensors in RAM"
        is_timed = any(phase.seconds for phase in self.phases)  # the speed of another machine is unknown
        lines = [self.first_line(), f"  {self.settings}"]
        lines += [f"  {self.choice}"] if self.choice else []
        lines.append(f"  {'phase':<10}{where:>15}{'RAM':>10}{'time' if is_timed else '':>10}".rstrip())
        for phase in self.phases:
            time = "" if not is_timed else duration(phase.seconds) if phase.seconds else "-"
            lines.append(f"  {phase.name:<10}{gb(phase.device):>15}{gb(phase.ram):>10}{time:>10}".rstrip())
        note = "on the device: tensors; VRAM above includes the driver. " if self.machine.device_bytes else ""
        timing = ". time: at least, with empty caches; -: unknown" if is_timed else ""
        lines.append(f"  {note}RAM: of the whole process{timing}")
        lines.append("  disk: " + ", ".join(f"{name} {gb(size)}" for name, size in self.disk.items() if size))
        lines.append(f"  {self.flops_per_step / 1e12:.3g} TFLOP a step")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "fits": not self.unfit(),
            "machine": {
                "name": self.machine.name, "device_bytes": self.machine.device_bytes,
                "ram_bytes": self.machine.ram_bytes,
            },
            "phases": {
                p.name: {"device_bytes": p.device, "ram_bytes": p.ram, "seconds": p.seconds} for p in self.phases
            },
            "device_peak_bytes": self.device_peak, "ram_peak_bytes": self.ram_peak, "disk_bytes": self.disk,
            "flops_per_step": self.flops_per_step, "seconds_per_step": self.seconds_per_step, "settings": self.settings,
            "choice": self.choice,
        }  # fmt: skip


def bytes_to_reserve(tensors: int) -> int:
    """Return the free memory that an accelerator needs for this many bytes of tensors."""
    return int(tensors * (1 + DEVICE_GAPS)) + DEVICE_OVERHEAD


def duration(seconds: float) -> str:
    """Format a duration with two digits or more, such as 0.082 s, 36 s, 33 min, 6.2 h, 12 days."""
    units = (("days", 86400, 172800), ("h", 3600, 7200), ("min", 60, 120), ("s", 1, 0))
    unit, value = next((unit, seconds / length) for unit, length, least in units if seconds >= least)
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"


def gb(size: int) -> str:
    """Format a size, such as 24.5 GB, 3.21 GB, 87 MB."""
    if size < GB // 10:
        return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
    return f"{size / GB:.2f} GB" if size < 10 * GB else f"{size / GB:.1f} GB"


def this_machine(device: torch.device, dtype: str) -> Machine:
    """Return this machine with its free memory now. Its speed is measured with one matrix product."""
    flops = product_flops(device, DTYPES[dtype])
    cpu = torch.device("cpu")
    free, total = (0, 0) if device.type == "cpu" else (free_bytes(device), total_bytes(device))
    return Machine(device_name(device), free, free_bytes(cpu), flops, total, total_bytes(cpu))


def with_memory(here: Machine, vram_gb: float, ram_gb: float) -> Machine:
    """Return this machine with other amounts of memory.

    Args:
        vram_gb: memory of another accelerator, whose speed is unknown; 0: the accelerator here.
        ram_gb: RAM; 0: the free RAM here. Both are in the GB that cards and modules are sold in, 2^30 bytes: a "12 GB"
            card has 12.9e9 bytes.
    """
    if vram_gb:
        size = int(vram_gb * SOLD_GB)
        here = Machine(f"{vram_gb:g} GB", size, here.ram_bytes, device_total=size, ram_total=here.ram_total)
    ram = int(ram_gb * SOLD_GB)
    return replace(here, ram_bytes=ram, ram_total=ram) if ram else here
