"""What can be seen to be wrong with a request before a model loads, without torch."""

from __future__ import annotations

from pathlib import Path

from ..config.request import TrainRequest
from ..data.folder import SUFFIXES
from ..host import Host
from ..problems import Problem
from ..quant.packages import missing_packages


def problems_of(request: TrainRequest, host: Host) -> list[Problem]:
    """Folders without images, and settings that contradict each other. Quick: stops at the first image it finds."""
    found: list[Problem] = []
    for part, root in zip(request.dataset.parts, request.dataset.roots, strict=True):
        if not any(path.suffix.lower() in SUFFIXES for path in Path(root).rglob("*")):
            endings = " ".join(sorted(SUFFIXES))
            found.append(
                Problem(
                    "dataset", f"no images in {part.folder!r} or its subfolders; put files there that end in {endings}"
                )
            )
    found += missing_packages(request.model.quantization)
    training, memory = request.training, request.memory
    if training.steps and training.warmup_steps >= training.steps:
        found.append(
            Problem(
                "warmup_steps",
                f"{training.warmup_steps} steps of warm-up leave nothing of {training.steps} steps; use at most {training.steps - 1}",
            )
        )
    if memory.checkpointing_interval > 1 and not training.gradient_checkpointing:
        found.append(
            Problem(
                "checkpointing_interval",
                f"is {memory.checkpointing_interval}, but gradient_checkpointing is off; turn it on, or use 1",
            )
        )
    return found
