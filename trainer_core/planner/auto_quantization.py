"""QuantizeModel's level auto: the highest precision with which the training fits the machine.

It depends on the machine's total memory, not on the free memory, so that the same workflow always gives the same LoRA
on a machine.
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
    """Return the request with its quantization level resolved, and log the level that auto chose.

    Where no level fits it is the coarsest: memory settings that offload weights may still make it fit.
    """
    if request.model.quantization.level != AUTO:
        return request
    room = replace(
        machine,
        device_bytes=int(SHARE * (machine.device_total or machine.device_bytes)),
        ram_bytes=int(SHARE * (machine.ram_total or machine.ram_bytes)),
    )
    chosen = _with_finest_level(request, family, index, room, host.paths.cache)
    available = f"{gb(room.device_bytes)} of VRAM" if room.device_bytes else f"{gb(room.ram_bytes)} of RAM"
    level = chosen.model.quantization.level
    host.emit(Notice(f"quantization auto: {level}, for {available} ({SHARE:.0%} of the total)"))
    return chosen


def _with_finest_level(request: TrainRequest, family: Family, index: Index, room: Machine, cache: Path) -> TrainRequest:
    # Init loftq corrects quantization errors, so it needs a quantized base.
    levels = list(FINEST_FIRST)[1:] if request.training.init == "loftq" else list(FINEST_FIRST)
    candidate = with_level(request, levels[0])
    estimator = make_estimator(candidate, family, index, room, cache)
    for level in levels:
        candidate = with_level(request, level)
        if not {phase.name for phase in estimator.plan(_minimize_memory(candidate, room)).unfit()} & {"load", "train"}:
            break
    return candidate


def _minimize_memory(request: TrainRequest, room: Machine) -> TrainRequest:
    """Where the memory mode is auto, use the least memory without offloading weights.

    That is: every block is recomputed, and activations are offloaded to RAM.
    """
    if request.memory.mode != "auto":
        return request
    moves = bool(room.device_bytes) and not request.memory.compile
    return with_memory(request, mode="manual", checkpointing_interval=1, activation_offload=moves)
