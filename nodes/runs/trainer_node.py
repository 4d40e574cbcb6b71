"""LoRATrainer as commands and other nodes use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ...trainer_core.host import SinkHost
from ...trainer_core.spec import NodeSpec
from ...trainer_core.workflow.execute import TrainerNode


def trainer_node() -> TrainerNode:
    """Return LoRATrainer with all nodes that a workflow around it may have."""
    from .. import CATALOGUE, lora_trainer
    from ..widget_schemas import schemas
    from ..wizard import quick_lora

    def catalogue_with(call: Callable[[Any, SinkHost], tuple[Any, ...]]) -> Mapping[str, NodeSpec]:
        catalogue = {**CATALOGUE, lora_trainer.SPEC.id: replace(lora_trainer.SPEC, run=call)}
        catalogue[quick_lora.SPEC.id] = replace(quick_lora.SPEC, run=partial(quick_lora.run_with, catalogue))
        return catalogue

    return TrainerNode(
        CATALOGUE,
        schemas(),
        lora_trainer.SPEC.id,
        lora_trainer.request_of,
        lora_trainer.train_with,
        (lora_trainer.SPEC.id, quick_lora.SPEC.id),
        catalogue_with,
    )
