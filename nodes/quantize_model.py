"""QuantizeModel: quantization of the frozen base model and the text encoder."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated

from ..trainer_core.config.model import AUTO, LEVELS, ModelConfig, QuantizationConfig
from ..trainer_core.host import Host
from ..trainer_core.spec import Choice, Doc, NodeSpec, Output, Socket, fields_of

DEFAULTS = {field.name: field for field in fields_of(QuantizationConfig)}


@dataclass(frozen=True, kw_only=True)
class Inputs(QuantizationConfig):
    level: Annotated[str, Choice(*LEVELS, AUTO), Doc(DEFAULTS["level"].doc)] = "int8-quanto"
    model: Annotated[ModelConfig, Socket("TRAIN_MODEL"), Doc("The model to quantize.")]


def run(inputs: Inputs, host: Host) -> tuple[ModelConfig]:
    """Return the model with these quantization settings."""
    values = {field.name: getattr(inputs, field.name) for field in fields(QuantizationConfig)}
    return (replace(inputs.model, quantization=QuantizationConfig(**values)),)


SPEC = NodeSpec(
    id="QuantizeModel",
    title="Quantize Model",
    category="ChromaTrainer",
    description="Quantizes the frozen base model and the text encoder to save memory while a LoRA is trained.",
    inputs=Inputs,
    outputs=(Output("model", "TRAIN_MODEL", "The model, which is quantized when it is loaded."),),
    run=run,
    light=True,
    search_aliases=("int8", "int4", "nf4", "fp8", "quanto", "bitsandbytes", "torchao", "quantise", "vram"),
)
