"""Model files that a person chose by name, for the nodes that load models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from ..trainer_core.errors import Problem
from ..trainer_core.host import Host, collect
from ..trainer_core.spec import Choice, Doc, ModelFile, Output

OWN_PART = "from flavour"  # the choice that names no file

# Fields and output that the nodes have in common.
T5File = Annotated[str, ModelFile("text_encoders", OWN_PART), Doc("A T5-XXL file from models/text_encoders instead.")]
VaeFile = Annotated[str, ModelFile("vae", OWN_PART), Doc("A Flux VAE file (ae.safetensors) from models/vae instead.")]
BaseDtype = Annotated[
    str,
    Choice("bf16", "fp16", "fp32"),
    Doc(
        "Precision of the frozen base. The LoRA's own weights are always trained in fp32. On a CPU fp32 is the fastest."
    ),
]
MODEL = Output("model", "TRAIN_MODEL", "The chosen model, for QuantizeModel, LoRATrainer and ValidateSampler.")


def finder(host: Host, problems: list[Problem]) -> Callable[..., str]:
    """find(kind, name, field, none=OWN_PART) -> absolute path; "" for the choice `none`, and where nothing is found: a problem."""

    def find(kind: str, name: str, field: str, none: str = OWN_PART) -> str:
        path = None if name == none else collect(problems, host.paths.find_model, kind, name, field)
        return str(path) if path else ""

    return find
