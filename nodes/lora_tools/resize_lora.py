"""ResizeLoRA: a LoRA of a lower rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...trainer_core.errors import Problem
from ...trainer_core.host import Host
from ...trainer_core.spec import NodeSpec
from .lora_model import OUTPUTS, Energy, LoraModel, Rank, SaveAs, finish, name_problems


@dataclass(frozen=True, kw_only=True)
class Inputs:
    lora_model: LoraModel
    rank: Rank = 0
    energy: Energy = 0.95
    save_as: SaveAs = ""

    def problems(self) -> list[Problem]:
        """Return what is wrong with the name, and a problem if nothing says how far the rank is reduced."""
        missing = (
            []
            if self.rank or self.energy
            else [Problem("rank", "is 0, and so is energy; set one of them, such as energy 0.95")]
        )
        return [*missing, *name_problems(self.save_as)]


def run(inputs: Inputs, host: Host) -> tuple[Any, str, str]:
    """Return the LoRA of a lower rank."""
    from ...trainer_core.lora_tools.progress import progress_of
    from ...trainer_core.lora_tools.reader import of_tensors
    from ...trainer_core.lora_tools.surgery import Cut, Losses, resize
    from ...trainer_core.lora_tools.writer import edited_metadata

    lora, cut, losses = of_tensors(inputs.lora_model), Cut(inputs.rank, inputs.energy), Losses()
    metadata = edited_metadata("lora resize", [(lora, "")], rank=inputs.rank, energy=inputs.energy)
    progress = progress_of(host, "resizing")
    return finish(host, "resized", lambda: resize(lora, cut, losses, progress), metadata, inputs.save_as, losses.text)


SPEC = NodeSpec(
    id="ResizeLoRA",
    title="Resize LoRA",
    category="ChromaTrainer/lora",
    description="Reduces the rank of a LoRA, layer by layer, to what holds a share of its update; the report has the "
    "error.",
    inputs=Inputs,
    outputs=OUTPUTS,
    run=run,
    is_output=True,
    search_aliases=("rank", "compress", "svd", "shrink", "lora"),
)
