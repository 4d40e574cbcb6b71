"""Hints about settings of the training and the optimizer that are likely to be mistakes. None of them is an error."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from ..config.dataset import DatasetConfig
from ..config.optimizer import OptimizerConfig
from ..config.training import HUBER_C, LR_SCHEDULES, TrainingConfig

if TYPE_CHECKING:  # so that `check` does not import torch
    from ..optim.optimizer import OptimizerPart

FAR = 10  # factor outside the usual learning rates


def describe_hints(training: TrainingConfig, config: OptimizerConfig, part: OptimizerPart) -> list[str]:
    """Return one line for each setting that has no effect or is unusual."""
    lines = [
        f"OptimizerSettings.{name} is {getattr(config, name)}, but {who} does not use it: it has no effect"
        for name, who in _find_unused(training, config, part)
    ]
    if training.huber_c != HUBER_C and training.loss != "huber":
        lines.append(f"huber_c is {training.huber_c:g}, but loss is {training.loss}: it has no effect")
    if training.alpha > training.rank:
        lines.append(
            f"alpha is {training.alpha:g} and rank {training.rank}: the update is scaled by alpha / rank, "
            f"{training.alpha / training.rank:g} times, like a learning rate that is as much higher; set alpha to 0 "
            "for a scale of 1"
        )
    if training.init == "orthogonal" and config.optimizer == "adamw_bf16":
        lines.append(
            "init orthogonal with adamw_bf16: the product of its factors is 0 until they are rounded to bf16, and the "
            "update then starts at about 0.2 % of each weight; use adamw, or another init"
        )
    low, high = part.usual_rates
    if not low / FAR <= training.learning_rate <= high * FAR:
        lines.append(
            f"learning_rate is {training.learning_rate:g}; with {config.optimizer} {low:g} to {high:g} is usual, "
            "see docs/optimizers.md"
        )
    if part.averages and not LR_SCHEDULES[training.lr_schedule].endless:
        lines.append(
            f"lr_schedule is {training.lr_schedule}, but {config.optimizer} averages its weights instead of lowering "
            "the rate: constant is usual"
        )
    return lines + describe_prodigy(training, config)


def describe_prodigy(training: TrainingConfig, config: OptimizerConfig) -> list[str]:
    """Return one line for each switch of Prodigy that is off although this run needs it."""
    if config.optimizer != "prodigy":
        return []
    lines = []
    if not config.prodigy_bias_correction:
        lines.append(
            "prodigy without prodigy_bias_correction: the first 1,000 steps are up to 6 times as long as the learning "
            "rate in the chart, and a LoRA may be destroyed; turn it on in OptimizerSettings (docs/optimizers.md)"
        )
    low_rates = f"warmup_steps is {training.warmup_steps}" if training.warmup_steps else ""
    if training.lr_schedule == "cosine_with_restarts":
        low_rates = "lr_schedule is cosine_with_restarts"
    if low_rates and not config.prodigy_safeguard_warmup:
        lines.append(
            f"{low_rates}, and prodigy without prodigy_safeguard_warmup: steps with a low rate make its estimate too "
            "high; turn it on in OptimizerSettings, or train without them (docs/optimizers.md)"
        )
    return lines


def describe_preservation(training: TrainingConfig, dataset: DatasetConfig) -> list[str]:
    """Return one line for each folder: which prediction `preservation` holds, or that its class word has no effect."""
    words = {(part.trigger.strip(), part.class_word.strip()) for part in dataset.parts}
    if not training.preservation:
        return [f"class_word is {word!r}, but preservation is 0: it has no effect" for _, word in sorted(words) if word]
    return [
        f"preservation {training.preservation:g}: the prediction for captions with {word!r} in place of {trigger!r} "
        "is held"
        if word
        else f"preservation {training.preservation:g}: the prediction for the empty caption is held (class_word "
        "is empty)"
        for trigger, word in sorted(words)
    ]


def _find_unused(training: TrainingConfig, config: OptimizerConfig, part: OptimizerPart) -> list[tuple[str, str]]:
    unused = []
    for field in fields(OptimizerConfig):
        if field.name in ("optimizer", "clip_by") or getattr(config, field.name) == field.default:
            continue
        if field.name.startswith("lr_"):
            if field.name not in LR_SCHEDULES[training.lr_schedule].uses:
                unused.append((field.name, f"the schedule {training.lr_schedule}"))
        elif field.name not in part.uses:
            unused.append((field.name, config.optimizer))
    return unused
