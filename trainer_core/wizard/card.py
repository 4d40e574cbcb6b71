"""The graphics card that will train."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """The accelerator of this machine: its name, and its memory in GB as it is sold; 0 for none."""

    name: str = ""
    gigabytes: float = 0.0


def detect_card(name: str = "") -> Card:
    """Return the accelerator of this machine. name: the device that trains; "": the best one."""
    from ..devices import device_name, pick_device, total_bytes

    device = pick_device(name)
    if device.type == "cpu":
        return Card()
    return Card(device_name(device), float(round(total_bytes(device) / (1 << 30))))
