"""LoRATrainer as commands and other nodes use it."""

from __future__ import annotations

from ...trainer_core.workflow.execute import TrainerNode


def trainer_node() -> TrainerNode:
    """Return LoRATrainer with all nodes that a workflow around it may have."""
    from .. import CATALOGUE, lora_trainer
    from ..widget_schemas import schemas

    return TrainerNode(CATALOGUE, schemas(), lora_trainer.SPEC.id, lora_trainer.request_of, lora_trainer.train_with)
