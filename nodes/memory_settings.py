"""MemorySettings: memory use and speed of the training."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..trainer_core.config.memory import MemoryConfig
from ..trainer_core.host import Host
from ..trainer_core.spec import NodeSpec, Output


@dataclass(frozen=True, kw_only=True)
class Inputs(MemoryConfig):
    pass


def run(inputs: Inputs, host: Host) -> tuple[MemoryConfig]:
    """Return the memory settings."""
    return (MemoryConfig(**{field.name: getattr(inputs, field.name) for field in fields(MemoryConfig)}),)


SPEC = NodeSpec(
    id="MemorySettings",
    title="Memory Settings",
    category="ChromaTrainer/settings",
    description="Controls the memory use and the speed of the training.",
    inputs=Inputs,
    outputs=(Output("memory", "TRAIN_MEMORY", "Memory settings, for LoRATrainer."),),
    run=run,
    light=True,
    search_aliases=("offload", "vram", "checkpointing", "compile"),
)
