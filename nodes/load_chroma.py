"""LoadChroma: choice of the Chroma model to train. Loads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..trainer_core.config.model import CHROMA_REPOS, ModelConfig
from ..trainer_core.errors import Problem, UserError
from ..trainer_core.host import ASSETS, Host
from ..trainer_core.models.loading.header_check import family_of_file
from ..trainer_core.setup.part_check import file_problems
from ..trainer_core.spec import Choice, Doc, ModelFile, NodeSpec, Text
from .model_files import MODEL, OWN_PART, BaseDtype, T5File, VaeFile, find_transformer, finder

RADIANCE = "radiance"  # name of the family and of its only flavour
REPOS = {"nano": str(ASSETS / "chroma-nano"), **CHROMA_REPOS}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    flavour: Annotated[
        str,
        Choice("nano", "hd", "base", "flash"),
        Doc(
            "Chroma variant. nano: a tiny Chroma model, included in this pack, which trains on any machine. hd: "
            "start here for a LoRA. base: for long finetunes. flash: needs no CFG."
        ),
    ] = "nano"
    folder: Annotated[
        str,
        Text(placeholder="empty: from flavour"),
        Doc(
            "Local model in diffusers format: its folder name in models/diffusers. Empty: use the flavour's Hugging "
            "Face repository, which is downloaded once (not if HF_HUB_OFFLINE is set)."
        ),
    ] = ""
    diffusion_model: Annotated[
        str,
        ModelFile("diffusion_models", OWN_PART),
        Doc(
            "Load the transformer from a single file in models/diffusion_models (bf16, fp8, GGUF, or quantized: "
            "docs/bases.md), or from a diffusers folder that holds a transformer; headless also from a Hugging Face "
            "repository (owner/name). If diffusion_model, text_encoder and vae are all set, nothing is downloaded. A file of "
            "Chroma1-Radiance is recognized; it works on pixels and needs no vae."
        ),
    ] = OWN_PART
    text_encoder: T5File = OWN_PART
    vae: VaeFile = OWN_PART
    dtype: BaseDtype = "bf16"


def run(inputs: Inputs, host: Host) -> tuple[ModelConfig]:
    """Return the chosen model, with absolute paths of its files. A file of Radiance decides the family.

    Raises:
        UserError: a file or folder does not exist, or is not the part that it should be.
    """
    problems: list[Problem] = []
    find = finder(host, problems)
    transformer = find_transformer(host, problems, inputs.diffusion_model)
    is_radiance = bool(transformer) and family_of_file(Path(transformer)) == RADIANCE
    if is_radiance and inputs.vae != OWN_PART:
        text = f"is set, but {Path(transformer).name} is Chroma Radiance, which works on pixels and has no VAE; "
        problems.append(Problem("vae", f"{text}use {OWN_PART!r}"))
    # Radiance has no repository in diffusers' format. It takes T5 from the flavour's, and nano's is too small.
    flavour = "hd" if is_radiance and inputs.flavour == "nano" else inputs.flavour
    model = ModelConfig(
        family=RADIANCE if is_radiance else "chroma",
        flavour=RADIANCE if is_radiance else inputs.flavour,
        repo=find("diffusers", inputs.folder, "folder", none="") if inputs.folder.strip() else REPOS[flavour],
        transformer_file=transformer,
        text_encoder_file=find("text_encoders", inputs.text_encoder, "text_encoder"),
        vae_file="" if is_radiance else find("vae", inputs.vae, "vae"),
        dtype=inputs.dtype,
    )
    files = {
        "transformer": (model.transformer_file, "diffusion_model"),
        "text_encoder": (model.text_encoder_file, "text_encoder"),
        "vae": (model.vae_file, "vae"),
    }
    if is_radiance:
        del files["vae"]
    if problems or (problems := file_problems(model, files, "folder")):
        raise UserError(problems)
    return (model,)


SPEC = NodeSpec(
    id="LoadChroma",
    title="Load Chroma",
    category="ChromaTrainer",
    description="Selects the Chroma model to train. It is loaded when the training starts.",
    inputs=Inputs,
    outputs=(MODEL,),
    run=run,
    light=True,
    search_aliases=("chroma", "train", "lora", "checkpoint"),
)
