"""Fields and helpers that LoadChroma and LoadFlux share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from ..trainer_core.errors import Problem
from ..trainer_core.host import Host, collect
from ..trainer_core.models.loading.locate import is_hub_id
from ..trainer_core.spec import Choice, Doc, ModelFile, Output

OWN_PART = "from flavour"  # the option that selects no file

T5File = Annotated[
    str,
    ModelFile("text_encoders", OWN_PART),
    Doc("Load T5-XXL from a single file in models/text_encoders (safetensors or GGUF)."),
]
VaeFile = Annotated[
    str, ModelFile("vae", OWN_PART), Doc("Load the Flux VAE from a single file in models/vae (ae.safetensors).")
]
BaseDtype = Annotated[
    str,
    Choice("bf16", "fp16", "fp32"),
    Doc(
        "Precision of the frozen base model. The LoRA weights are always trained in fp32. On a CPU, fp32 is the "
        "fastest."
    ),
]
MODEL = Output("model", "TRAIN_MODEL", "The model, for QuantizeModel, LoRATrainer and ValidateSampler.")


def finder(host: Host, problems: list[Problem]) -> Callable[..., str]:
    """Return a function find(kind, name, field, none=OWN_PART) that looks up a model file.

    It returns the absolute path, or "" if the name is `none`. If the file does not exist, it adds a problem to the list
    and returns "".
    """

    def find(kind: str, name: str, field: str, none: str = OWN_PART) -> str:
        path = None if name == none else collect(problems, host.paths.find_model, kind, name, field)
        return str(path) if path else ""

    return find


def find_transformer(host: Host, problems: list[Problem], name: str) -> str:
    """Return the source of a transformer: absolute path of a file or diffusers folder, or a Hugging Face repository.

    If there is none, it adds a problem to the list and returns "".
    """
    field = "diffusion_model"
    if name == OWN_PART:
        return ""
    own_problems: list[Problem] = []
    for kind in ("diffusion_models", "diffusers"):
        if path := collect(own_problems, host.paths.find_model, kind, name, field):
            return str(path)
    if is_hub_id(name):
        return name
    problems.append(own_problems[0])
    return ""
