"""LoadLoRAFile: a LoRA file as a LORA_MODEL connection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from ...trainer_core.errors import Problem, UserError
from ...trainer_core.host import Host, Paths, collect
from ...trainer_core.spec import Doc, ModelFile, NodeSpec
from .lora_model import LORA_MODEL

NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    lora: Annotated[str, ModelFile("loras", NONE), Doc("A LoRA of any tool, in models/loras or output/loras.")] = NONE

    def problems(self) -> list[Problem]:
        """Return a problem if no file is chosen."""
        return [Problem("lora", "no LoRA is chosen; choose a file of models/loras")] if self.lora == NONE else []


def preflight(inputs: Inputs, host: Host) -> list[Problem]:
    """Return a problem if the file does not exist."""
    problems: list[Problem] = []
    collect(problems, host.paths.find_model, "loras", inputs.lora, "lora")
    return problems


def fingerprint(values: Mapping[str, Any], paths: Paths) -> str:
    """Return a text that changes when the file changes."""
    try:
        stat = paths.find_model("loras", str(values.get("lora", NONE)), "lora").stat()
    except (UserError, OSError) as error:
        return str(error)
    return f"{stat.st_size} {stat.st_mtime_ns}"


def run(inputs: Inputs, host: Host) -> tuple[Any]:
    """Return the tensors of the file, with its metadata."""
    from ...trainer_core.lora_tools.reader import load_tensors

    return (load_tensors(host.paths.find_model("loras", inputs.lora, "lora")),)


SPEC = NodeSpec(
    id="LoadLoRAFile",
    title="Load LoRA File",
    category="ChromaTrainer/lora",
    description="Loads the weights and the metadata of a LoRA file, to check, merge, resize or scale them.",
    inputs=Inputs,
    outputs=(LORA_MODEL,),
    run=run,
    preflight=preflight,
    fingerprint=fingerprint,
    search_aliases=("lora", "open", "doctor"),
)
