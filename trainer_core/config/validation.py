"""Validation settings: the prompts to sample and how. The widgets of ValidateSampler."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from ..errors import Problem, UserError
from ..spec import Advanced, Choice, Doc, Last, Range, Seed, Socket, Text
from ..storage.bounded_files import Unusable, parse_json
from .guidance import THRESHOLD, CfgStart, DisabledSteps, Threshold, UncondZeroScale
from .model import ModelConfig

RESOLUTION_PATTERN = re.compile(r"(\d+)\s*[xX×]\s*(\d+)")
OFF, FAST, TAEF1 = "off", "fast", "taef1"  # previews
NO_SCORE, CLIP = "none", "clip"  # score
CLIP_REPO = "openai/clip-vit-large-patch14"
CHECKPOINTS_PATTERN = re.compile(r"all|last(?:\s+(?P<last>[1-9]\d{0,8}))?")


@dataclass(frozen=True)
class CheckpointChoice:
    """Selection of checkpoints. Empty (false): the final LoRA.

    Args:
        every: all checkpoints.
        last: this many of the most recent checkpoints.
        steps: the checkpoints of these steps.
    """

    every: bool = False
    last: int | None = None
    steps: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self.every or self.last is not None or bool(self.steps)

    def pick(self, available: Sequence[int]) -> list[int]:
        """Return the selected steps, in ascending order.

        Args:
            available: steps of the run's checkpoints.
        Raises:
            UserError: a selected step is not available; the message lists those that are.
        """
        steps = sorted(available)
        missing = [step for step in self.steps if step not in steps]
        if missing or not steps:
            listed = ", ".join(map(str, steps)) or "none"
            lack = f"no checkpoint of step {', '.join(map(str, missing))}" if missing else "no checkpoint"
            message = f"the run has {lack}; available: {listed} (see keep_checkpoints and keep_every of LoRATrainer)"
            raise UserError.at("checkpoints", message)
        if self.steps:
            return sorted(set(self.steps))
        return steps if self.last is None else steps[-self.last :]


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Prompts and sampling settings.

    The defaults are those of ComfyUI's Chroma template, because that is where the LoRA will be used.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("reference", "score_model")
    LATER: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("sampling",), ("reference",), ("attention",), ("previews",), ("score", "score_model"), ("sampling_model",),
    )  # fmt: skip
    KEY: ClassVar[tuple[str, ...]] = (
        "ValidationConfig", "prompts", "negative_prompt", "steps", "cfg", "resolutions", "seed", "scheduler", "shift",
        "lora_strength", "guidance", "threshold", "uncond_zero_scale", "cfg_start_pct", "initial_disabled_steps",
        "checkpoints", "sampling", "reference", "attention",
    )  # fmt: skip

    prompts: Annotated[
        str,
        Text(multiline=True, placeholder="one prompt per line, or a JSON object of names and prompts"),
        Doc(
            "Prompts: one per line, or a prompt library: a JSON object of names and prompts, or the path of a .json "
            "file with one, looked up like a dataset folder. Images of a library are also saved by name."
        ),
    ] = ""
    negative_prompt: Annotated[
        str, Text(multiline=True), Doc("Negative prompt: what CFG steers away from. Has no effect at cfg 1.")
    ] = ""
    steps: Annotated[int, Range(1, 1000), Doc("Number of sampling steps.")] = 26
    cfg: Annotated[
        float, Range(1.0, 30.0, 0.1), Doc("Classifier-free guidance scale. 1.0: no CFG, one forward pass per step.")
    ] = 3.5
    resolutions: Annotated[
        str,
        Text(),
        Doc(
            "Image sizes as width x height, separated by commas: 1024x1024, 832x1216. Each prompt is sampled at each "
            "size."
        ),
    ] = "1024x1024"
    seed: Annotated[int, Range(0, 2**53 - 1), Seed(), Doc("Seed of the initial noise, the same for every image.")] = 0
    scheduler: Annotated[
        str,
        Choice("beta", "simple", "normal"),
        Doc("Spacing of the sigmas, as in ComfyUI's schedulers of the same names."),
    ] = "beta"
    shift: Annotated[
        float,
        Range(0.01, 100.0, 0.01),
        Doc("Same as shift of ModelSamplingAuraFlow. ComfyUI's Chroma template uses 1."),
    ] = 1.0
    lora_strength: Annotated[
        str,
        Text(),
        Doc("LoRA strengths, separated by commas: 0.5, 1.0. Has no effect if no LoRA is connected."),
    ] = "1.0"
    guidance: Annotated[
        str,
        Choice("cfg", "adaptive"),
        Doc(
            "cfg: run both prompts at every step. adaptive: stop running the negative prompt once it has almost no "
            "effect, as AdaptiveGuider does."
        ),
        Advanced(),
    ] = "cfg"
    threshold: Annotated[Threshold, Advanced()] = THRESHOLD
    uncond_zero_scale: Annotated[UncondZeroScale, Advanced()] = 0.0
    cfg_start_pct: Annotated[CfgStart, Advanced()] = 0.0
    initial_disabled_steps: Annotated[DisabledSteps, Advanced()] = 0
    checkpoints: Annotated[
        str,
        Text(placeholder="all, last 3, or steps: 500, 1000"),
        Doc(
            "Checkpoints of the LoRA's run to sample with: all, last 3, or steps separated by commas. Empty: the "
            "final LoRA. With several strengths, each prompt gets a grid of checkpoints by strengths. Has no effect "
            "if no LoRA is connected."
        ),
    ] = ""
    sampling: Annotated[
        str,
        Choice("as set", "by model"),
        Doc(
            "by model: use the recommended steps, cfg, scheduler and shift of the model's flavour, and ignore those "
            "above. as set: use those above."
        ),
        Advanced(),
    ] = "as set"
    reference: Annotated[
        str,
        Text(placeholder="empty: none"),
        Advanced(),
        Doc(
            "Only for Flux kontext: reference image for every prompt, such as my-folder/cat.png, looked up like a "
            "dataset folder. It is cropped to the aspect ratio of the sampled image."
        ),
    ] = ""
    attention: Annotated[
        str,
        Choice("same", "native", "sage"),
        Advanced(),
        Doc(
            "Attention kernel for sampling. same: the kernel of MemorySettings during training, native otherwise. "
            "native: chosen by torch. sage: SageAttention (8 bits, CUDA only, needs its package)."
        ),
    ] = "same"
    previews: Annotated[
        str,
        Choice(OFF, FAST, TAEF1),
        Advanced(),
        Last(),
        Doc(
            "Show each image while it is sampled, at most twice a second: on the node, and as preview.jpg in the run's "
            "folder. fast: small, with colors fitted to the VAE. taef1: sharper, by the tiny autoencoder in "
            "models/vae_approx. The sampled images are the same."
        ),
    ] = OFF
    score: Annotated[
        str,
        Choice(NO_SCORE, CLIP),
        Advanced(),
        Last(),
        Doc(
            "clip: score the images with a CLIP model. CLIP score: how well an image fits its prompt. Likeness: how "
            "similar it is to the held-out images of the dataset (holdout of LoRATrainer). The model is on the device "
            "only while it scores. The sampled images are the same."
        ),
    ] = NO_SCORE
    score_model: Annotated[
        str,
        Text(placeholder="folder or Hugging Face repository of a CLIP model"),
        Advanced(),
        Last(),
        Doc(
            "CLIP model for score: a folder in models/clip_vision, models/diffusers or models/text_encoders with its "
            "config.json, tokenizer and .safetensors file, or a Hugging Face repository, which is downloaded if it is "
            "not on this machine (1.7 GB)."
        ),
    ] = CLIP_REPO
    sampling_model: Annotated[
        ModelConfig | None,
        Socket("TRAIN_MODEL"),
        Last(),
        Doc(
            "Model that samples the images of LoRATrainer during training, with the LoRA that is trained, in place of "
            "the trained model: such as Chroma1-Flash for a LoRA of Chroma1-HD. It must have the same layers. Loaded "
            "for each validation. This node's own images use it too, unless `model` is connected."
        ),
    ] = None

    def problems(self) -> list[Problem]:
        """Return the problems of these settings."""
        problems = []
        for parse in (self.library, self.sizes, self.strengths, self.checkpoint_choice):
            try:
                parse()
            except UserError as error:
                problems.extend(error.problems)
        return problems

    def problems_of_model(self, name: str) -> list[Problem]:
        """Return what these settings ask for and a whole model, which kind full trains, does not have."""
        problems = []
        if set(self.strengths()) != {1.0}:
            text = f"is {self.lora_strength}, but {name} is a whole model, which has the strength 1 alone; use 1.0"
            problems.append(Problem("lora_strength", text))
        if self.checkpoint_choice():
            text = f"{name} is a whole model, whose checkpoints hold its trained weights alone; leave this field empty"
            problems.append(Problem("checkpoints", text))
        if self.sampling_model:
            text = f"{name} is a whole model, and no LoRA that another model could be sampled with; disconnect it"
            problems.append(Problem("sampling_model", text))
        return problems

    def of_the_images(self) -> ValidationConfig:
        """Return what decides the images."""
        return replace(self, previews=OFF, score=NO_SCORE, score_model=CLIP_REPO)

    @property
    def library_file(self) -> str:
        """The path of a prompt library's file, as it was entered; "" if the prompts are written out."""
        text = self.prompts.strip().strip('"')
        return text if text.lower().endswith(".json") and not text.startswith("{") and "\n" not in text else ""

    @property
    def is_named(self) -> bool:
        """Whether the prompts have names of their own: a prompt library."""
        return self.prompts.strip().startswith("{")

    def library(self) -> dict[str, str]:
        """Return a map of name to prompt, in order. Prompts given as lines are their own names.

        Raises:
            UserError: there are no prompts, or the JSON is invalid.
        """
        text = self.prompts.strip()
        if not text:
            raise UserError.at("prompts", "is empty; write one prompt per line")
        if not text.startswith("{"):
            return {line.strip(): line.strip() for line in text.splitlines() if line.strip()}
        try:
            library = parse_json(text)
        except Unusable as error:
            raise UserError.at("prompts", f"starts with {{ but {error}") from error
        wrong = [key for key, value in library.items() if not isinstance(value, str)]
        if wrong or not library:
            message = (
                f"every prompt in a prompt library must be a string; not a string: {', '.join(wrong) or '(empty)'}"
            )
            raise UserError.at("prompts", message)
        return library

    def sizes(self) -> list[tuple[int, int]]:
        """Return the image sizes as (width, height) in pixels, multiples of 16.

        Raises:
            UserError: there are no sizes, or one is invalid.
        """
        sizes = []
        for part in filter(None, (part.strip() for part in self.resolutions.split(","))):
            match = RESOLUTION_PATTERN.fullmatch(part)
            if not match:
                raise UserError.at("resolutions", f"{part!r} is not width x height; write for example 1024x1024")
            width, height = int(match[1]), int(match[2])
            for edge in (width, height):
                if edge % 16 or not 16 <= edge <= 8192:
                    lower = edge // 16 * 16
                    near = dict.fromkeys(min(max(value, 16), 8192) for value in (lower, lower + 16))
                    fix = f"use {' or '.join(map(str, near))}"
                    raise UserError.at(
                        "resolutions",
                        f"{edge} in {part!r} is not a multiple of 16 from 16 to 8192; {fix}",
                    )
            sizes.append((width, height))
        if not sizes:
            raise UserError.at("resolutions", "is empty; write for example 1024x1024")
        return sizes

    def checkpoint_choice(self) -> CheckpointChoice:
        """Return the selected checkpoints.

        Raises:
            UserError: the text is not a valid selection.
        """
        text = self.checkpoints.strip().lower()
        if match := CHECKPOINTS_PATTERN.fullmatch(text):
            return CheckpointChoice(last=None if text == "all" else int(match["last"] or 1), every=text == "all")
        try:
            return CheckpointChoice(steps=tuple(int(part) for part in text.split(",") if part.strip()))
        except ValueError as error:
            raise UserError.at(
                "checkpoints",
                f"{self.checkpoints!r} is not a valid selection; write all, last 3, or steps such as 500, 1000",
            ) from error

    def strengths(self) -> list[float]:
        """Return the LoRA strengths, from -10 to 10.

        Raises:
            UserError: there are none, or one is not a number in this range.
        """
        try:
            values = [float(part) for part in self.lora_strength.split(",") if part.strip()]
        except ValueError as error:
            raise UserError.at(
                "lora_strength", f"{self.lora_strength!r} is not a list of numbers; write for example 0.5, 1.0"
            ) from error
        if not values or any(not -10 <= value <= 10 for value in values):
            raise UserError.at(
                "lora_strength", f"{self.lora_strength!r} must be numbers from -10 to 10, such as 0.5, 1.0"
            )
        return values
