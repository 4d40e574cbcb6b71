"""ScaleLoRA: strengths by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from ...trainer_core.config.adapter import block_rules
from ...trainer_core.errors import Problem
from ...trainer_core.host import Host
from ...trainer_core.lora_tools.presets import PRESETS
from ...trainer_core.spec import Choice, Doc, NodeSpec, Range, Text
from .lora_model import OUTPUTS, LoraModel, SaveAs, finish, name_problems


@dataclass(frozen=True, kw_only=True)
class Inputs:
    lora_model: LoraModel
    strength: Annotated[float, Range(-100.0, 100.0, 0.05), Doc("Multiplies the strengths of all blocks.")] = 1.0
    preset: Annotated[
        str,
        Choice(*PRESETS),
        Doc(
            "Blocks and layers that stay. attention, mlp: only these layers. without text layers: leaves out what "
            "changes the text stream. without edge blocks: leaves out double blocks 0, 1, 17 and 18, which "
            "overtrained LoRAs draw lines with."
        ),
    ] = "all"
    blocks: Annotated[
        str,
        Text(placeholder="as the preset"),
        Doc(
            "Strengths per block, after the preset, such as double_blocks.0-3=0.5; single_blocks.*=0. The last "
            "matching rule applies. 0: leave the layers out of the LoRA."
        ),
    ] = ""
    save_as: SaveAs = ""

    def problems(self) -> list[Problem]:
        """Return what is wrong with the rules and with the name of the file."""
        problems = name_problems(self.save_as)
        try:
            block_rules(self.blocks)
        except ValueError as error:
            problems.append(Problem("blocks", str(error)))
        return problems


def run(inputs: Inputs, host: Host) -> tuple[Any, str, str]:
    """Return the LoRA with these strengths."""
    from ...trainer_core.lora_tools.progress import progress_of
    from ...trainer_core.lora_tools.reader import of_tensors
    from ...trainer_core.lora_tools.surgery import scale_blocks
    from ...trainer_core.lora_tools.writer import edited_metadata

    lora, strength, preset = of_tensors(inputs.lora_model), inputs.strength, inputs.preset
    applied = f"{strength:g} times {'; '.join(filter(None, [preset, inputs.blocks]))}"
    metadata = edited_metadata("lora strength", [(lora, applied)])
    progress = progress_of(host, "scaling")
    return finish(
        host, "scaled", lambda: scale_blocks(lora, preset, inputs.blocks, strength, progress), metadata, inputs.save_as
    )


SPEC = NodeSpec(
    id="ScaleLoRA",
    title="Scale LoRA",
    category="ChromaTrainer/lora",
    description="Changes the strength of a LoRA by block, or leaves blocks out, for good.",
    inputs=Inputs,
    outputs=OUTPUTS,
    run=run,
    is_output=True,
    search_aliases=("strength", "block weight", "lbw", "lora"),
)
