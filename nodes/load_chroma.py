"""LoadChroma: which Chroma is trained, as a value. Loads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..trainer_core.config.model import CHROMA_REPOS, ModelConfig
from ..trainer_core.host import ASSETS, Host
from ..trainer_core.problems import Problem, UserError
from ..trainer_core.spec import Choice, Doc, ModelFile, NodeSpec, Output, Text
from .model_files import OWN_PART, finder

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
    text_encoder: Annotated[
        str, ModelFile("text_encoders", OWN_PART), Doc("A T5-XXL file from models/text_encoders instead.")
    ] = OWN_PART
    vae: Annotated[
        str, ModelFile("vae", OWN_PART), Doc("A Flux VAE file (ae.safetensors) from models/vae instead.")
    ] = OWN_PART
    dtype: Annotated[
        str,
        Choice("bf16", "fp16", "fp32"),
        Doc(
            "Precision of the frozen base. The LoRA's own weights are always trained in fp32. On a CPU fp32 is the fastest."
        ),
    ] = "bf16"


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
    outputs=(Output("model", "TRAIN_MODEL", "The chosen model, for QuantizeModel, LoRATrainer and ValidateSampler."),),
    run=run,
    light=True,
    search_aliases=("chroma", "train", "lora", "checkpoint"),
)
