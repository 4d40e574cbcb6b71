"""MemorySettings: how the training fits into memory, and how fast it goes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..trainer_core.config.memory import MemoryConfig
from ..trainer_core.host import Host
from ..trainer_core.spec import NodeSpec, Output


@dataclass(frozen=True, kw_only=True)
class Inputs(MemoryConfig):
    pass


def run(inputs: Inputs, host: Host) -> tuple[MemoryConfig]:
    return (MemoryConfig(**{field.name: getattr(inputs, field.name) for field in fields(MemoryConfig)}),)


SPEC = NodeSpec(
    id="MemorySettings",
    title="Memory Settings",
    category="ChromaTrainer/settings",
    description="How the training fits into memory, and how fast it goes.",
    inputs=Inputs,
    outputs=(Output("memory", "TRAIN_MEMORY", "The memory settings, for LoRATrainer."),),
    run=run,
    light=True,
    search_aliases=("offload", "vram", "checkpointing", "compile"),
)
