"""PlanRun: what a LoRATrainer with the same inputs would take, and what fits where it would not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from ..trainer_core.errors import Problem
from ..trainer_core.host import Host, Notice
from ..trainer_core.spec import Doc, NodeSpec, Output, Range
from . import lora_trainer


@dataclass(frozen=True, kw_only=True)
class Inputs(lora_trainer.Inputs):
    vram_gb: Annotated[
        float,
        Range(0, 1024, 0.1),
        Doc("Memory of the accelerator to plan for, in GB (10^9 bytes). 0: what is free on this machine."),
    ] = 0.0
    ram_gb: Annotated[float, Range(0, 65536, 0.1), Doc("RAM to plan for, in GB. 0: what is free on this machine.")] = (
        0.0
    )


def plan(inputs: lora_trainer.Inputs, host: Host, vram_gb: float = 0.0, ram_gb: float = 0.0) -> tuple[Any, str]:
    """The MemoryPlan, and what would make it fit in words ('' where it fits)."""
    from ..trainer_core.devices import pick_device
    from ..trainer_core.planner.memory_plan import this_machine, with_memory
    from ..trainer_core.train.planning import plan_request

    request = lora_trainer.request_of(inputs)
    machine = this_machine(pick_device(host.device), request.model.dtype)
    found, advice, _ = plan_request(request, host, with_memory(machine, vram_gb, ram_gb))
    return found, advice


def text_of(found: Any, advice: str) -> str:
    return found.text() + (f"\n  {advice}" if advice else "")


def preflight(inputs: Inputs, host: Host) -> list[Problem]:
    return lora_trainer.preflight(inputs, host)


def run(inputs: Inputs, host: Host) -> tuple[str]:
    text = text_of(*plan(inputs, host, inputs.vram_gb, inputs.ram_gb))
    host.emit(Notice(text))
    return (text,)


SPEC = NodeSpec(
    id="PlanRun",
    title="Plan Run",
    category="ChromaTrainer",
    description="Takes the inputs of LoRATrainer and says what the run would take of memory, disk and time, phase by phase, and the cheapest change where it would not fit. Loads no weights.",
    inputs=Inputs,
    outputs=(Output("plan", "STRING", "The plan as text, for ComfyUI's Preview as Text node."),),
    run=run,
    preflight=preflight,
    is_output=True,
    search_aliases=("vram", "memory", "forecast", "out of memory"),
)
