"""ExtractLoRA: the difference of two models as a LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from ...trainer_core.config.model import ModelConfig
from ...trainer_core.errors import Problem
from ...trainer_core.host import Host
from ...trainer_core.spec import Doc, NodeSpec, Range, Socket
from .lora_model import OUTPUTS, Energy, SaveAs, finish, name_problems


@dataclass(frozen=True, kw_only=True)
class Inputs:
    base: Annotated[ModelConfig, Socket("TRAIN_MODEL"), Doc("The original model, from LoadChroma or LoadFlux.")]
    tuned: Annotated[ModelConfig, Socket("TRAIN_MODEL"), Doc("The model that was trained from it.")]
    rank: Annotated[int, Range(1, 4096), Doc("Largest rank of a layer.")] = 32
    energy: Energy = 0.0
    save_as: SaveAs = "extracted"

    def problems(self) -> list[Problem]:
        """Return what is wrong with the name of the file."""
        return name_problems(self.save_as)


def run(inputs: Inputs, host: Host) -> tuple[Any, str, str]:
    """Return the LoRA."""
    from ...trainer_core.devices import pick_device
    from ...trainer_core.lora_tools.extract import extract, model_metadata, open_config
    from ...trainer_core.lora_tools.progress import progress_of
    from ...trainer_core.lora_tools.surgery import Cut, Losses

    host.free_memory()
    base, tuned, device = open_config(inputs.base), open_config(inputs.tuned), pick_device(host.device)
    cut, losses = Cut(inputs.rank, inputs.energy), Losses()
    metadata = model_metadata(base, tuned, progress_of(host, "identifying both models", "files"))
    progress = progress_of(host, "extracting")
    return finish(
        host,
        "extracted",
        lambda: extract(base, tuned, cut, losses, progress, device),
        metadata,
        inputs.save_as,
        losses.text,
    )


SPEC = NodeSpec(
    id="ExtractLoRA",
    title="Extract LoRA",
    category="ChromaTrainer/lora",
    description="Extracts a LoRA from a model that was trained from another one: the difference of each layer, "
    "reduced to a low rank. Reads both models layer by layer.",
    inputs=Inputs,
    outputs=OUTPUTS,
    run=run,
    is_output=True,
    search_aliases=("difference", "svd", "distill", "finetune", "lora"),
)
