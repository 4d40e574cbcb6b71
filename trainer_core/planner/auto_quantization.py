"""QuantizeModel's level auto: the finest numbers with which a training fits the machine.

What counts is the memory that the machine has, not what is free today, so that the same workflow gives the same LoRA there every day.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..config.model import AUTO
from ..config.request import TrainRequest
from ..data.dataset import Index
from ..host import Host, Notice
from ..models.family import Family
from ..quant.levels import FINEST_FIRST
from .auto_tune import SHARE, with_level, with_memory
from .estimator import make_estimator
from .memory_plan import Machine, gb


def with_precision(request: TrainRequest, family: Family, index: Index, machine: Machine, host: Host) -> TrainRequest:
    """The request with a level that can be loaded, told where it was left to the plan.

    Where none fits, the coarsest: memory settings that move weights may still make it fit.
    """
    if request.model.quantization.level != AUTO:
        return request
    room = replace(
        machine,
        device_bytes=int(SHARE * (machine.device_total or machine.device_bytes)),
        ram_bytes=int(SHARE * (machine.ram_total or machine.ram_bytes)),
    )
    chosen = _finest(request, family, index, room, host.paths.cache)
    has = f"{gb(room.device_bytes)} of VRAM" if room.device_bytes else f"{gb(room.ram_bytes)} of RAM"
    level = chosen.model.quantization.level
    host.emit(Notice(f"quantisation auto: {level}, for {has} ({SHARE:.0%} of what there is)"))
    return chosen


def _finest(request: TrainRequest, family: Family, index: Index, room: Machine, cache: Path) -> TrainRequest:
    levels = (
        list(FINEST_FIRST)[1:] if request.training.init == "loftq" else list(FINEST_FIRST)
    )  # loftq mends what rounding lost
    asked = with_level(request, levels[0])
    made = make_estimator(asked, family, index, room, cache)
    for level in levels:
        asked = with_level(request, level)
        if not {phase.name for phase in made.plan(_leanest(asked, room)).unfit()} & {"load", "train"}:
            break
    return asked


def _leanest(request: TrainRequest, room: Machine) -> TrainRequest:
    """Where the memory settings are the plan's to choose: every block computed again, activations in RAM, and no weight moved."""
    if request.memory.mode != "auto":
        return request
    moves = bool(room.device_bytes) and not request.memory.compile
    return with_memory(request, mode="manual", checkpointing_interval=1, activation_offload=moves)
