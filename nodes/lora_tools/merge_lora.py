"""MergeLoRA: the sum of two LoRAs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from ...trainer_core.errors import Problem
from ...trainer_core.host import Host
from ...trainer_core.spec import Doc, NodeSpec, Range, Socket
from .lora_model import OUTPUTS, Energy, LoraModel, Rank, SaveAs, finish, name_problems

Strength = Annotated[float, Range(-100.0, 100.0, 0.05), Doc("Strength of this LoRA in the sum.")]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    lora_a: LoraModel
    lora_b: Annotated[dict, Socket("LORA_MODEL"), Doc("The LoRA that is added.")]
    strength_a: Strength = 1.0
    strength_b: Strength = 1.0
    rank: Rank = 0
    energy: Energy = 0.0
    save_as: SaveAs = ""

    def problems(self) -> list[Problem]:
        """Return what is wrong with the name of the file."""
        return name_problems(self.save_as)


def run(inputs: Inputs, host: Host) -> tuple[Any, str, str]:
    """Return the merged LoRA."""
    from ...trainer_core.lora_tools.progress import progress_of
    from ...trainer_core.lora_tools.reader import of_tensors
    from ...trainer_core.lora_tools.surgery import Cut, Losses, merge
    from ...trainer_core.lora_tools.writer import edited_metadata

    loras = [
        (of_tensors(inputs.lora_a, "lora_a"), inputs.strength_a),
        (of_tensors(inputs.lora_b, "lora_b"), inputs.strength_b),
    ]
    cut, losses = Cut(inputs.rank, inputs.energy), Losses()
    parents = [(lora, f"strength {strength:g}") for lora, strength in loras]
    metadata = edited_metadata("lora merge", parents, rank=inputs.rank, energy=inputs.energy)
    progress = progress_of(host, "merging")
    return finish(host, "merged", lambda: merge(loras, cut, losses, progress), metadata, inputs.save_as, losses.text)


SPEC = NodeSpec(
    id="MergeLoRA",
    title="Merge LoRA",
    category="ChromaTrainer/lora",
    description="Adds two LoRAs with strengths. Exact if rank and energy are 0, when their ranks add up; else reduced "
    "to a lower rank, with the error in the report. For more than two, merge the result again.",
    inputs=Inputs,
    outputs=OUTPUTS,
    run=run,
    is_output=True,
    search_aliases=("combine", "add", "sum", "lora"),
)
