"""What is drawn to see what was learnt: the widgets of ValidateSampler."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..errors import Problem, UserError
from ..spec import Advanced, Choice, Doc, Range, Seed, Text
from .guidance import THRESHOLD, CfgStart, DisabledSteps, Threshold, UncondZeroScale

RESOLUTION_PATTERN = re.compile(r"(\d+)\s*[xX×]\s*(\d+)")


CHECKPOINTS_PATTERN = re.compile(r"all|last(?:\s+(?P<last>[1-9]\d{0,8}))?")


@dataclass(frozen=True)
class CheckpointChoice:
    """every: all there are; last: so many of the last ones; steps: these. None of them: the LoRA as it ended."""

    every: bool = False
    last: int | None = None
    steps: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self.every or self.last is not None or bool(self.steps)

    def pick(self, available: Sequence[int]) -> list[int]:
        """Steps out of those that there are, rising.

        Raises:
            UserError: one that is asked for is not there; names those that are.
        """
        there = sorted(available)
        missing = [step for step in self.steps if step not in there]
        if missing or not there:
            shown = ", ".join(map(str, there)) or "none"
            what = f"no checkpoint of step {', '.join(map(str, missing))}" if missing else "no checkpoint"
            raise UserError.at("checkpoints", f"the run has {what}; there are: {shown} (keep_checkpoints, keep_every)")
        if self.steps:
            return sorted(set(self.steps))
        return there if self.last is None else there[-self.last :]


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Prompts and sampling. Defaults are those of ComfyUI's Chroma template, because that is where the LoRA will be used."""

    PATHS: ClassVar = ("reference",)
    LATER: ClassVar = (("sampling",), ("reference",), ("attention",))

    prompts: Annotated[
        str,
        Text(multiline=True, placeholder="one prompt a line, or a JSON object of nicknames and prompts"),
        Doc("One prompt a line, or a prompt library: a JSON object of nicknames and their prompts."),
    ] = ""
    negative_prompt: Annotated[
        str, Text(multiline=True), Doc("What CFG steers away from. Without effect at cfg 1.")
    ] = ""
    steps: Annotated[int, Range(1, 1000), Doc("Sampling steps.")] = 26
    cfg: Annotated[float, Range(1.0, 30.0, 0.1), Doc("Strength of real CFG; 1.0 is a single pass without it.")] = 3.5
    resolutions: Annotated[
        str, Text(), Doc("Width x height, several by commas: 1024x1024, 832x1216. Each prompt is drawn at each.")
    ] = "1024x1024"
    seed: Annotated[
        int, Range(0, 2**53 - 1), Seed(), Doc("Seed of the starting noise, the same for every picture.")
    ] = 0
    scheduler: Annotated[
        str,
        Choice("beta", "simple", "normal"),
        Doc("Spacing of the noise levels, as ComfyUI's schedulers of these names."),
    ] = "beta"
    shift: Annotated[
        float, Range(0.01, 100.0, 0.01), Doc("As ModelSamplingAuraFlow's shift; ComfyUI's Chroma template uses 1.")
    ] = 1.0
    lora_strength: Annotated[
        str,
        Text(),
        Doc("Strength of the LoRA, several by commas: 0.5, 1.0. Without effect where no LoRA is connected."),
    ] = "1.0"
    guidance: Annotated[
        str,
        Choice("cfg", "adaptive"),
        Doc(
            "cfg: both prompts run at every step. adaptive: as AdaptiveGuider, the negative prompt stops running once it changes "
            "next to nothing."
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
            "Checkpoints of the LoRA's run to draw with: all, last 3, or steps by commas. Empty: the LoRA as it ended. With several "
            "strengths each prompt gets a grid of checkpoints by strengths. Without effect where no LoRA is connected."
        ),
    ] = ""
    sampling: Annotated[
        str,
        Choice("as set", "by model"),
        Doc(
            "by model: steps, cfg, scheduler and shift are those that the chosen flavour wants, whatever is set above. as set: those above."
        ),
        Advanced(),
    ] = "as set"
    reference: Annotated[
        str,
        Text(placeholder="empty: none"),
        Advanced(),
        Doc(
            "For Flux kontext alone: the picture that every prompt starts from, such as my-folder/cat.png, looked up like a dataset's folder. It is "
            "cropped to the size that is drawn."
        ),
    ] = ""
    attention: Annotated[
        str,
        Choice("same", "native", "sage"),
        Advanced(),
        Doc(
            "Kernel that computes attention while pictures are drawn. same: MemorySettings' in a training, else native. native: torch's choice. "
            "sage: SageAttention, 8 bits, on CUDA, with its package installed."
        ),
    ] = "same"

    def problems(self) -> list[Problem]:
        found = []
        for read in (self.library, self.sizes, self.strengths, self.checkpoint_choice):
            try:
                read()
            except UserError as error:
                found.extend(error.problems)
        return found

    def library(self) -> dict[str, str]:
        """Nickname -> prompt, in order. Lines are their own nicknames."""
        text = self.prompts.strip()
        if not text:
            raise UserError.at("prompts", "is empty; write one prompt a line")
        if not text.startswith("{"):
            return {line.strip(): line.strip() for line in text.splitlines() if line.strip()}
        try:
            library = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError.at(
                "prompts", f"begins with {{ but is not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
            ) from error
        wrong = [key for key, value in library.items() if not isinstance(value, str)]
        if wrong or not library:
            raise UserError.at("prompts", f"a prompt library wants texts; not a text: {', '.join(wrong) or '(empty)'}")
        return library

    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) in pixels, each a multiple of 16."""
        sizes = []
        for part in filter(None, (part.strip() for part in self.resolutions.split(","))):
            match = RESOLUTION_PATTERN.fullmatch(part)
            if not match:
                raise UserError.at("resolutions", f"{part!r} is not width x height; write for example 1024x1024")
            width, height = int(match[1]), int(match[2])
            for edge in (width, height):
                if edge % 16 or not 16 <= edge <= 8192:
                    near = dict.fromkeys(min(max(value, 16), 8192) for value in (edge // 16 * 16, edge // 16 * 16 + 16))
                    raise UserError.at(
                        "resolutions",
                        f"{edge} in {part!r} is not a multiple of 16 from 16 to 8192; use {' or '.join(map(str, near))}",
                    )
            sizes.append((width, height))
        if not sizes:
            raise UserError.at("resolutions", "is empty; write for example 1024x1024")
        return sizes

    def checkpoint_choice(self) -> CheckpointChoice:
        """Which checkpoints are meant."""
        text = self.checkpoints.strip().lower()
        if match := CHECKPOINTS_PATTERN.fullmatch(text):
            return CheckpointChoice(last=None if text == "all" else int(match["last"] or 1), every=text == "all")
        try:
            return CheckpointChoice(steps=tuple(int(part) for part in text.split(",") if part.strip()))
        except ValueError as error:
            raise UserError.at(
                "checkpoints",
                f"{self.checkpoints!r} is no choice of checkpoints; write all, last 3, or steps such as 500, 1000",
            ) from error

    def strengths(self) -> list[float]:
        """LoRA strengths, -10 to 10."""
        try:
            values = [float(part) for part in self.lora_strength.split(",") if part.strip()]
        except ValueError as error:
            raise UserError.at(
                "lora_strength", f"{self.lora_strength!r} is not a list of numbers; write for example 0.5, 1.0"
            ) from error
        if not values or any(not -10 <= value <= 10 for value in values):
            raise UserError.at(
                "lora_strength", f"{self.lora_strength!r} wants numbers from -10 to 10, such as 0.5, 1.0"
            )
        return values
