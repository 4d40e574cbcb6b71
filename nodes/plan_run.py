"""PlanRun: memory, disk and time estimates for a LoRATrainer with the same inputs, and changes that make it fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..trainer_core.errors import Problem
from ..trainer_core.host import Host, Notice
from ..trainer_core.spec import Doc, NodeSpec, Output, Range
from . import lora_trainer


@dataclass(frozen=True, kw_only=True)
class Inputs(lora_trainer.Inputs):
    vram_gb: Annotated[
        float,
        Range(0, 1024, 0.1),
        Doc(
            "Accelerator memory to plan for, in GB as cards are sold (2^30 bytes). 0: the free memory of this machine."
        ),
    ] = 0.0
    ram_gb: Annotated[
        float,
        Range(0, 65536, 0.1),
        Doc("RAM to plan for, in GB as it is sold (2^30 bytes). 0: the free RAM of this machine."),
    ] = 0.0


def preflight(inputs: Inputs, host: Host) -> list[Problem]:
    """Return the problems that can be found before a model is loaded."""
    return lora_trainer.preflight(inputs, host)


def run(inputs: Inputs, host: Host) -> tuple[str]:
    """Return the plan as text, and report it as a notice."""
    from ..trainer_core.train.planning import plan_for, plan_text

    text = plan_text(*plan_for(lora_trainer.request_of(inputs), host, inputs.vram_gb, inputs.ram_gb))
    host.emit(Notice(text))
    return (text,)


SPEC = NodeSpec(
    id="PlanRun",
    title="Plan Run",
    category="ChromaTrainer",
    description="Estimates the memory, disk space and time of a run, phase by phase, from the inputs of LoRATrainer. "
    "If the run does not fit, suggests the cheapest change. Loads no weights.",
    inputs=Inputs,
    outputs=(Output("plan", "STRING", "The plan as text, for ComfyUI's Preview as Text node."),),
    run=run,
    preflight=preflight,
    is_output=True,
    search_aliases=("vram", "memory", "forecast", "out of memory"),
)
