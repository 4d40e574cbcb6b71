"""QuantizeModel: in how few bits the frozen base is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from ..trainer_core.config.model import ModelConfig, QuantizationConfig
from ..trainer_core.host import Host
from ..trainer_core.registry import names
from ..trainer_core.spec import Choice, Doc, NodeSpec, Output, Socket


@dataclass(frozen=True, kw_only=True)
class Inputs:
    model: Annotated[ModelConfig, Socket("TRAIN_MODEL"), Doc("The model to quantise.")]
    level: Annotated[
        str,
        Choice(*names("quantization")),
        Doc(
            "none: as loaded. int8-quanto: block weights in 8 bits, about 0.28 of fp32's memory, output within 0.3 %. Only the frozen base is "
            "quantised; embedders, norms, the approximator and the final projection stay as they are."
        ),
    ] = "int8-quanto"


def run(inputs: Inputs, host: Host) -> tuple[ModelConfig]:
    return (replace(inputs.model, quantization=QuantizationConfig(level=inputs.level)),)


SPEC = NodeSpec(
    id="QuantizeModel",
    title="Quantize Model",
    category="ChromaTrainer",
    description="Keeps the frozen base in fewer bits while a LoRA is trained on it.",
    inputs=Inputs,
    outputs=(Output("model", "TRAIN_MODEL", "The same model, to be quantised when it is loaded."),),
    run=run,
    light=True,
    search_aliases=("int8", "quanto", "quantise", "vram"),
)
