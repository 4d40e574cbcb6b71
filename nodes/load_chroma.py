"""LoadChroma: which Chroma is trained, as a value. Loads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..trainer_core.config.model import CHROMA_REPOS, ModelConfig
from ..trainer_core.errors import Problem, UserError
from ..trainer_core.host import ASSETS, Host
from ..trainer_core.spec import Choice, Doc, ModelFile, NodeSpec, Text
from .model_files import MODEL, OWN_PART, BaseDtype, T5File, VaeFile, finder

REPOS = {"nano": str(ASSETS / "chroma-nano"), **CHROMA_REPOS}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    flavour: Annotated[
        str,
        Choice("nano", "hd", "base", "flash"),
        Doc(
            "nano: a tiny Chroma that comes with the pack, trains on any machine. hd: start here for a LoRA. base: for long finetunes. flash: CFG baked in."
        ),
    ] = "nano"
    folder: Annotated[
        str,
        Text(placeholder="empty: from flavour"),
        Doc(
            "A local copy in diffusers layout, by its name under models/diffusers. Empty: the flavour's own repository, downloaded once unless HF_HUB_OFFLINE is set."
        ),
    ] = ""
    diffusion_model: Annotated[
        str,
        ModelFile("diffusion_models", OWN_PART),
        Doc(
            "A single file from models/diffusion_models instead; bf16, fp8 and fp8_scaled files are read. With all three files given nothing is downloaded."
        ),
    ] = OWN_PART
    text_encoder: T5File = OWN_PART
    vae: VaeFile = OWN_PART
    dtype: BaseDtype = "bf16"


def run(inputs: Inputs, host: Host) -> tuple[ModelConfig]:
    problems: list[Problem] = []

    find = finder(host, problems)
    model = ModelConfig(
        family="chroma",
        flavour=inputs.flavour,
        repo=find("diffusers", inputs.folder, "folder", none="") if inputs.folder.strip() else REPOS[inputs.flavour],
        transformer_file=find("diffusion_models", inputs.diffusion_model, "diffusion_model"),
        text_encoder_file=find("text_encoders", inputs.text_encoder, "text_encoder"),
        vae_file=find("vae", inputs.vae, "vae"),
        dtype=inputs.dtype,
    )
    if problems:
        raise UserError(problems)
    return (model,)


SPEC = NodeSpec(
    id="LoadChroma",
    title="Load Chroma",
    category="ChromaTrainer",
    description="Chooses the Chroma model to train. Nothing is loaded until training begins.",
    inputs=Inputs,
    outputs=(MODEL,),
    run=run,
    light=True,
    search_aliases=("chroma", "train", "lora", "checkpoint"),
)
