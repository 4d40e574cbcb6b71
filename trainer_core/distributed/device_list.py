"""The devices of a run: what `--devices` and LoRATrainer's field `devices` mean on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:  # so that checks of settings do not import torch
    import torch

    from ..config.training import TrainingConfig

DEVICES_VARIABLE = "CHROMA_TRAINER_DEVICES"  # devices of the processes on this machine, separated by commas
ACCELERATORS = ("cuda", "xpu")  # of which a machine can have several
FORMS = "auto, a number (1, 2), numbers of devices (0,1), names (cuda:0,cuda:1) or a number of CPU processes (cpu:2)"
MOST_PROCESSES = 1024  # for cpu:N


def devices_for(training: TrainingConfig, num_machines: int = 1) -> list[str]:
    """Return the names of the devices that the settings of a training select, see devices_of."""
    return devices_of(training.devices, training.accumulation, num_machines, training.is_sharded)


def devices_of(text: str, accumulation: int, num_machines: int = 1, is_even: bool = False) -> list[str]:
    """Return the names of the devices that a setting selects, each for a process of its own.

    [] stands for this process, and "" for the device that the trainer chooses.

    Args:
        text: the setting.
        accumulation: micro-batches of a step. auto does not select more devices than these can occupy.
        num_machines: machines that train together.
        is_even: all devices need the same number of micro-batches (shard). auto selects as many as divide them.
    Raises:
        UserError: it is malformed, or this machine lacks one of the devices.
    """
    text = text.strip().lower().replace(" ", "")
    if not text:
        return []
    if match := re.fullmatch(r"cpu:([1-9]\d{0,3})", text):
        return ["cpu"] * min(int(match[1]), MOST_PROCESSES)
    available = accelerators()
    if text == "auto":
        usable = available[: max(1, accumulation // num_machines)]
        if is_even:
            usable = usable[: _largest_even(len(usable), accumulation, num_machines)]
        return usable if len(usable) > 1 or num_machines > 1 else []
    if text == "1":
        return [""]
    if re.fullmatch(r"[1-9]\d{0,3}", text):
        return _first(int(text), available)
    parts = text.split(",")
    if all(re.fullmatch(r"\d{1,4}", part) for part in parts):
        kind = available[0].partition(":")[0] if available else ACCELERATORS[0]
        parts = [f"{kind}:{int(part)}" for part in parts]
    elif not all(re.fullmatch(r"[a-z]+:\d{1,4}|cpu|mps", part) for part in parts):
        raise UserError.at("devices", f"{text!r} is not a list of devices; use {FORMS}")
    missing = [part for part in parts if part not in (*available, "cpu", "mps")]
    if missing:
        raise UserError.at("devices", f"{', '.join(missing)}: not available; {_inventory(available)}")
    if len(set(parts)) < len(parts):
        raise UserError.at("devices", f"{text!r} names a device twice; use each of them once, or cpu:{len(parts)}")
    return parts


def _largest_even(most: int, accumulation: int, num_machines: int) -> int:
    """Return the largest number of devices, up to `most` on each machine, that divides the micro-batches of a step."""
    fitting = (count for count in range(most, 0, -1) if accumulation % (count * num_machines) == 0)
    return next(fitting, most)


def only_device(text: str) -> str:
    """Return the device that a setting names, such as cuda:1, or cpu for cpu:2; "" where it names none."""
    text = text.strip().lower()
    return "cpu" if text.startswith("cpu") else text if re.fullmatch(r"[a-z]+:\d{1,4}|mps", text) else ""


def _first(count: int, available: Sequence[str]) -> list[str]:
    if count > len(available):
        text = f"{count} devices are wanted; {_inventory(available)}. Use at most that many, or cpu:{count} for the CPU"
        raise UserError.at("devices", text)
    return list(available[:count])


def _inventory(available: Sequence[str]) -> str:
    return f"this machine has {', '.join(available)}" if available else "this machine has no CUDA, ROCm or XPU device"


def accelerators() -> list[str]:
    """Return the names of this machine's accelerators of the best kind."""
    import torch

    for kind in ACCELERATORS:
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            return [f"{kind}:{number}" for number in range(module.device_count())]
    return []


def is_worker() -> bool:
    """Return whether trainer_core/launch started this process, to train on one device."""
    return DEVICES_VARIABLE in os.environ


def num_launched() -> int:
    """Return how many processes torchrun or accelerate launch started together; 0 for a process that runs by itself."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdigit() and int(size) > 1 else 0


def idle_text(size: int, accumulation: int) -> str:
    """Return the message for more devices than a step has micro-batches."""
    most = "one device" if accumulation == 1 else f"at most {accumulation} devices"
    return (
        f"{size} devices for {accumulation} micro-batches a step (accumulation): {size - accumulation} of them would "
        f"have nothing to do. Set LoRATrainer.accumulation to {size} or a multiple, or use {most}"
    )


def local_rank_and_size() -> tuple[int, int]:
    """Return the number of this process on its machine, and how many a launcher started there."""
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    return rank, int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def device_of_rank() -> torch.device:
    """Return the device of this process, which torchrun or accelerate launch started as one of several.

    Raises:
        UserError: the machine has fewer devices than processes.
    """
    import torch

    local_rank, local_size = local_rank_and_size()
    chosen = [name for name in os.environ.get(DEVICES_VARIABLE, "").split(",") if name]
    devices = chosen or accelerators()
    if not devices:
        return torch.device("cpu")
    if local_rank >= len(devices):
        here = f"this machine, which has {len(devices)} devices ({', '.join(devices)})"
        text = f"{local_size} processes were started on {here}; start at most one process per device"
        raise UserError.at("devices", text)
    return torch.device(devices[local_rank])
