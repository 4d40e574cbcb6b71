"""Settings of the optimiser that do not help, told before a run begins. None of them is a fault."""

from __future__ import annotations

from dataclasses import fields

from ..config.optimizer import OptimizerConfig
from ..config.training import LR_SCHEDULES, TrainingConfig
from ..optim.optimizer import OptimizerPart

FAR = 10  # times outside the usual rates


def describe_hints(training: TrainingConfig, config: OptimizerConfig, part: OptimizerPart) -> list[str]:
    """One line for each setting that is without effect, or that is hardly what was meant."""
    told = [
        f"OptimizerSettings.{name} is {getattr(config, name)}, but {who} does not use it: it has no effect"
        for name, who in _find_unused(training, config, part)
    ]
    low, high = part.usual_rates
    if not low / FAR <= training.learning_rate <= high * FAR:
        told.append(
            f"learning_rate is {training.learning_rate:g}; with {config.optimizer} {low:g} to {high:g} is usual, see docs/optimizers.md"
        )
    if part.averages and not LR_SCHEDULES[training.lr_schedule].endless:
        told.append(
            f"lr_schedule is {training.lr_schedule}, but {config.optimizer} averages its weights in place of a falling rate: constant is usual"
        )
    return told


def _find_unused(training: TrainingConfig, config: OptimizerConfig, part: OptimizerPart) -> list[tuple[str, str]]:
    found = []
    for field in fields(OptimizerConfig):
        if field.name == "optimizer" or getattr(config, field.name) == field.default:
            continue
        if field.name.startswith("lr_"):
            if field.name not in LR_SCHEDULES[training.lr_schedule].uses:
                found.append((field.name, f"the schedule {training.lr_schedule}"))
        elif field.name not in part.uses:
            found.append((field.name, config.optimizer))
    return found
