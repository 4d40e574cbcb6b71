"""LoadFlux: which Flux.1 is trained, as a value. Loads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..trainer_core.config.flux import FLAVOURS, FluxOptions
from ..trainer_core.config.model import ModelConfig
from ..trainer_core.errors import Problem, UserError
from ..trainer_core.host import Host
from ..trainer_core.spec import Advanced, Choice, Doc, ModelFile, NodeSpec, Range, Text
from .model_files import MODEL, OWN_PART, BaseDtype, T5File, VaeFile, finder

BY_FLAVOUR = "by flavour"
NO_ASSISTANT = "none"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    flavour: Annotated[
        str,
        Choice(*FLAVOURS),
        Doc(
            "krea: start here. dev: the first one. schnell: four steps, Apache-2.0; wants an assistant. fluxbooru, libreflux: finetunes "
            "that want real CFG. kontext makes pictures out of others: DatasetBackend's references. Licences and gates: docs/flux.md."
        ),
    ] = "krea"
    folder: Annotated[
        str,
        Text(placeholder="empty: from flavour"),
        Doc(
            "A local copy in diffusers layout, by its name under models/diffusers. Empty: the flavour's own repository, downloaded once unless "
            "HF_HUB_OFFLINE is set; krea, dev and kontext ask you to accept their licence there first."
        ),
    ] = ""
    diffusion_model: Annotated[
        str,
        ModelFile("diffusion_models", OWN_PART),
        Doc(
            "A single file from models/diffusion_models instead; bf16, fp8 and fp8_scaled files are read. With all four files given nothing is downloaded."
        ),
    ] = OWN_PART
    t5: T5File = OWN_PART
    clip: Annotated[
        str,
        ModelFile("text_encoders", OWN_PART),
        Doc("A CLIP-L file (clip_l.safetensors) from models/text_encoders instead."),
    ] = OWN_PART
    vae: VaeFile = OWN_PART
    dtype: BaseDtype = "bf16"
    text_tokens: Annotated[
        int,
        Range(0, 512),
        Advanced(),
        Doc(
            "Tokens of text, pads among them: they are attended. 0: by flavour, 512 and schnell's 256. Fewer are faster and another model."
        ),
    ] = 0
    guidance: Annotated[
        float,
        Range(0.0, 30.0, 0.1),
        Advanced(),
        Doc(
            "Value of the guidance embedding in training. 0: by flavour, 1.0 (keeps the distillation) or fluxbooru's 3.5. 3.5 to 4.5 brings real CFG back. Without effect on schnell and libreflux."
        ),
    ] = 0.0
    drawn_guidance: Annotated[
        float,
        Range(0.0, 30.0, 0.1),
        Advanced(),
        Doc("What it is told while pictures are drawn: ComfyUI's FluxGuidance. 0: by flavour, 3.5, krea's 4.5."),
    ] = 0.0
    attention_mask: Annotated[
        str,
        Choice(BY_FLAVOUR, "on", "off"),
        Advanced(),
        Doc("on: pads are not attended by the transformer. by flavour: libreflux was trained so, the others were not."),
    ] = BY_FLAVOUR
    noise_levels: Annotated[
        str,
        Choice(BY_FLAVOUR, "as set"),
        Advanced(),
        Doc(
            "by flavour: schnell trains at its own few levels, whatever LoRATrainer's sigma_density says; the others as set there."
        ),
    ] = BY_FLAVOUR
    assistant: Annotated[
        str,
        ModelFile("loras", NO_ASSISTANT),
        Advanced(),
        Doc(
            "A LoRA that acts while the model trains and not while it draws, such as schnell's training adapter, which keeps its distillation from being unlearnt."
        ),
    ] = NO_ASSISTANT


def run(inputs: Inputs, host: Host) -> tuple[ModelConfig]:
    problems: list[Problem] = []

    find = finder(host, problems)
    rules = FLAVOURS[inputs.flavour]
    model = ModelConfig(
        family="flux",
        flavour=inputs.flavour,
        repo=find("diffusers", inputs.folder, "folder", none="") if inputs.folder.strip() else rules.repo,
        transformer_file=find("diffusion_models", inputs.diffusion_model, "diffusion_model"),
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
            assistant_file=find("loras", inputs.assistant, "assistant", NO_ASSISTANT),
        ),
    )
    if problems:
        raise UserError(problems)
    return (model,)


SPEC = NodeSpec(
    id="LoadFlux",
    title="Load Flux",
    category="ChromaTrainer",
    description="Chooses the Flux.1 model to train. Nothing is loaded until training begins.",
    inputs=Inputs,
    outputs=(MODEL,),
    run=run,
    light=True,
    search_aliases=("flux", "krea", "schnell", "train", "lora", "checkpoint"),
)
