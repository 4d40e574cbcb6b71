"""LoadFlux: choice of the Flux.1 model to train. Loads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..trainer_core.config.flux import (
    ASSISTANT_FILE,
    ASSISTANT_REPO,
    ASSISTED,
    FLAVOURS,
    UNMODIFIED,
    ZERO,
    FluxOptions,
    is_assistant,
)
from ..trainer_core.config.model import ModelConfig
from ..trainer_core.errors import Problem, UserError
from ..trainer_core.host import Host
from ..trainer_core.setup.part_check import file_problems
from ..trainer_core.spec import Advanced, Choice, Doc, Initial, ModelFile, NodeSpec, Range, Text
from .model_files import MODEL, OWN_PART, BaseDtype, T5File, VaeFile, find_transformer, finder

BY_FLAVOUR = "by flavour"
NO_ASSISTANT = "none"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    flavour: Annotated[
        str,
        Choice(*FLAVOURS),
        Doc(
            "Flux.1 variant. krea: start here. dev: the original model. schnell: four steps, Apache-2.0 license, "
            "needs an assistant. fluxbooru, libreflux: finetunes that need real CFG. kontext: edits reference images "
            "(references of DatasetBackend). See docs/flux.md for licenses and gated repositories."
        ),
    ] = "krea"
    folder: Annotated[
        str,
        Text(placeholder="empty: from flavour"),
        Doc(
            "Local model in diffusers format: its folder name in models/diffusers. Empty: use the flavour's Hugging "
            "Face repository, which is downloaded once (not if HF_HUB_OFFLINE is set). For krea, dev and kontext, "
            "first accept the license on the repository's page."
        ),
    ] = ""
    diffusion_model: Annotated[
        str,
        ModelFile("diffusion_models", OWN_PART),
        Doc(
            "Load the transformer from a single file in models/diffusion_models (bf16, fp8, GGUF, or quantized: "
            "docs/bases.md), or from a diffusers folder that holds a transformer; headless also from a Hugging Face "
            "repository (owner/name). If diffusion_model, t5, clip and vae are all set, nothing is downloaded."
        ),
    ] = OWN_PART
    t5: T5File = OWN_PART
    clip: Annotated[
        str,
        ModelFile("text_encoders", OWN_PART),
        Doc("Load CLIP-L from a single file in models/text_encoders (clip_l.safetensors)."),
    ] = OWN_PART
    vae: VaeFile = OWN_PART
    dtype: BaseDtype = "bf16"
    text_tokens: Annotated[
        int,
        Range(0, 512),
        Advanced(),
        Doc(
            "Length of the T5 text in tokens, including padding, which Flux attends to. 0: by flavour (512, or 256 for "
            "schnell). Fewer tokens are faster, but change the model's output."
        ),
    ] = 0
    guidance: Annotated[
        float,
        Range(0.0, 30.0, 0.1),
        Advanced(),
        Doc(
            "Guidance embedding in training. 0: by flavour (1.0, which keeps the distillation, or 3.5 for "
            "fluxbooru). 3.5 to 4.5 restores real CFG. Has no effect on schnell and libreflux."
        ),
    ] = 0.0
    drawn_guidance: Annotated[
        float,
        Range(0.0, 30.0, 0.1),
        Advanced(),
        Doc(
            "Guidance embedding in sampling, as in ComfyUI's FluxGuidance. 0: by flavour (3.5; 4.5 for krea; 2.5 for "
            "kontext)."
        ),
    ] = 0.0
    attention_mask: Annotated[
        str,
        Choice(BY_FLAVOUR, "on", "off"),
        Advanced(),
        Doc("Mask padding tokens in the transformer's attention. by flavour: on for libreflux, off for the others."),
    ] = BY_FLAVOUR
    noise_levels: Annotated[
        str,
        Choice(BY_FLAVOUR, "as set"),
        Advanced(),
        Doc(
            "Sigmas to train at. by flavour: schnell trains at its own few sigmas, and the others use sigma_density of "
            "LoRATrainer. as set: all use sigma_density."
        ),
    ] = BY_FLAVOUR
    assistant: Annotated[
        str,
        ModelFile("loras", NO_ASSISTANT, (BY_FLAVOUR,)),
        Initial(BY_FLAVOUR),
        Advanced(),
        Doc(
            "LoRA that is active in training but not in sampling, such as the training adapter for schnell, which "
            "preserves its distillation. by flavour: for schnell, the adapter in models/loras (schnell and training or "
            "assistant in its name) or in the Hugging Face cache; none for the others."
        ),
    ] = NO_ASSISTANT
    t5_padding: Annotated[
        str,
        Choice(UNMODIFIED, ZERO),
        Advanced(),
        Doc(
            "Embeddings of the T5 text beyond the caption. unmodified: T5's embeddings of padding tokens, as in "
            "ComfyUI. zero: zeros, in training and in validation images. Has no effect where padding is masked."
        ),
    ] = UNMODIFIED


def run(inputs: Inputs, host: Host) -> tuple[ModelConfig]:
    """Return the chosen model, with absolute paths of its files.

    Raises:
        UserError: a file or folder does not exist, or is not the part that it should be.
    """
    problems: list[Problem] = []
    find = finder(host, problems)
    rules = FLAVOURS[inputs.flavour]
    model = ModelConfig(
        family="flux",
        flavour=inputs.flavour,
        repo=find("diffusers", inputs.folder, "folder", none="") if inputs.folder.strip() else rules.repo,
        transformer_file=find_transformer(host, problems, inputs.diffusion_model),
        text_encoder_file=find("text_encoders", inputs.t5, "t5"),
        vae_file=find("vae", inputs.vae, "vae"),
        dtype=inputs.dtype,
        flux=FluxOptions(
            clip_file=find("text_encoders", inputs.clip, "clip"),
            max_tokens=inputs.text_tokens or rules.max_tokens,
            guidance=inputs.guidance or rules.guidance,
            drawn_guidance=inputs.drawn_guidance or rules.drawn_guidance,
            is_masked=rules.is_masked if inputs.attention_mask == BY_FLAVOUR else inputs.attention_mask == "on",
            is_fast=rules.is_fast and inputs.noise_levels == BY_FLAVOUR,
            assistant_file=_find_assistant(inputs, host)
            if inputs.assistant == BY_FLAVOUR
            else find("loras", inputs.assistant, "assistant", NO_ASSISTANT),
            t5_padding=inputs.t5_padding,
        ),
    )
    assert model.flux is not None
    files = {
        "transformer": (model.transformer_file, "diffusion_model"),
        "text_encoder": (model.text_encoder_file, "t5"),
        "clip": (model.flux.clip_file, "clip"),
        "vae": (model.vae_file, "vae"),
    }
    if problems or (problems := file_problems(model, files, "folder")):
        raise UserError(problems)
    return (model,)


def _find_assistant(inputs: Inputs, host: Host) -> str:
    """Return the path of schnell's training adapter in models/loras or in the Hub's cache, "" if there is none."""
    if inputs.flavour != ASSISTED:
        return ""
    name = next(filter(is_assistant, host.paths.list_models("loras")), "")
    if name:
        return str(host.paths.find_model("loras", name, "assistant"))
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(ASSISTANT_REPO, ASSISTANT_FILE)
    return cached if isinstance(cached, str) else ""


SPEC = NodeSpec(
    id="LoadFlux",
    title="Load Flux",
    category="ChromaTrainer",
    description="Selects the Flux.1 model to train. It is loaded when the training starts.",
    inputs=Inputs,
    outputs=(MODEL,),
    run=run,
    light=True,
    search_aliases=("flux", "krea", "schnell", "train", "lora", "checkpoint"),
)
