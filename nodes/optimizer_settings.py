"""OptimizerSettings: the optimizer and its hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..trainer_core.config.optimizer import OptimizerConfig
from ..trainer_core.host import Host
from ..trainer_core.spec import NodeSpec, Output


@dataclass(frozen=True, kw_only=True)
class Inputs(OptimizerConfig):
    pass


def run(inputs: Inputs, host: Host) -> tuple[OptimizerConfig]:
    """Return the optimizer settings."""
    return (OptimizerConfig(**{field.name: getattr(inputs, field.name) for field in fields(OptimizerConfig)}),)


SPEC = NodeSpec(
    id="OptimizerSettings",
    title="Optimizer Settings",
    category="ChromaTrainer/settings",
    description="Selects the optimizer, and sets its hyperparameters and those of the learning rate schedules.",
    inputs=Inputs,
    outputs=(Output("optimizer", "TRAIN_OPTIMIZER", "Optimizer settings, for LoRATrainer."),),
    run=run,
    light=True,
    search_aliases=("adamw", "prodigy", "lion", "8bit"),
)
