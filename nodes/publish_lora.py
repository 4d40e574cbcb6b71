"""PublishLora: publishes a trained LoRA on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..trainer_core.config.request import TrainedLora
from ..trainer_core.errors import Problem, UserError
from ..trainer_core.host import Host, Notice
from ..trainer_core.spec import Advanced, Doc, NodeSpec, Output, Socket, Text
from .lora_trainer import trains_model


@dataclass(frozen=True, kw_only=True)
class Inputs:
    lora: Annotated[TrainedLora, Socket("TRAINED_LORA"), Doc("The trained LoRA, from LoRATrainer.")]
    repo: Annotated[
        str,
        Text(placeholder="user/name"),
        Doc(
            "Hugging Face repository to publish in, as user/name. It is created if it does not exist. You must be "
            "logged in: hf auth login, or the environment variable HF_TOKEN."
        ),
    ] = ""
    private: Annotated[
        bool,
        Doc("Publish in a private repository, which only you can see. A repository that is public already is refused."),
    ] = True
    base_model: Annotated[
        str,
        Text(placeholder="empty: from the LoRA"),
        Advanced(),
        Doc("Hugging Face repository of the base model, for the model card. Empty: that of the LoRA's base model."),
    ] = ""


def preflight(inputs: Inputs, host: Host) -> list[Problem]:
    """Return the problems that can be found before the training, without a network."""
    from ..trainer_core.publishing.publish import repo_problems

    return repo_problems(inputs.repo, inputs.base_model.strip())


def accepts(inputs: Inputs, sources: Mapping[str, Any]) -> list[Problem]:
    """Return a problem where kind full will train a whole model."""
    return [whole_model("the output of kind full")] if trains_model(sources.get("lora")) else []


def whole_model(name: str) -> Problem:
    text = (
        f"{name} is a whole model, and this node publishes LoRAs; remove this node, and upload the file with hf upload. To "
        "publish a LoRA of the difference, set extract_rank in AdapterSettings, then run chroma-trainer publish on the "
        "extracted file"
    )
    return Problem("lora", text)


def run(inputs: Inputs, host: Host) -> tuple[Any, ...]:
    """Publish the LoRA, and return the address of its repository."""
    if inputs.lora.is_model:
        raise UserError([whole_model(inputs.lora.name)])
    from ..trainer_core.publishing.publish import publish

    result = publish(Path(inputs.lora.path), inputs.repo, inputs.private, host, inputs.base_model.strip())
    host.emit(Notice(f"published: {result.url}"))
    return (result.url,)


SPEC = NodeSpec(
    id="PublishLora",
    title="Publish LoRA",
    category="ChromaTrainer",
    description="Publishes a trained LoRA on the Hugging Face Hub, with a model card, sample images and the workflow.",
    inputs=Inputs,
    outputs=(Output("url", "STRING", "Address of the repository."),),
    run=run,
    preflight=preflight,
    accepts=accepts,
    is_output=True,
    search_aliases=("hugging face", "upload", "hub", "model card"),
)
