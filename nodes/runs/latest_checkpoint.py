"""LatestCheckpoint: the newest LoRA of a run, also while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from ...trainer_core.errors import Problem, UserError
from ...trainer_core.host import Host, Notice, Paths, collect
from ...trainer_core.spec import Doc, NodeSpec, Output, Text
from ..lora_tools.lora_model import LORA_MODEL

if TYPE_CHECKING:
    from ...trainer_core.lora_tools.reader import LoraTensors
    from ...trainer_core.runs.newest_lora import NewestLora

TRIES = 3  # the run may remove an old checkpoint while it is read


@dataclass(frozen=True, kw_only=True)
class Inputs:
    run: Annotated[
        str,
        Text(placeholder="the newest run"),
        Doc("Name of the LoRA, which stands for its latest run, or of a run's folder. Empty: the newest run."),
    ] = ""


def preflight(inputs: Inputs, host: Host) -> list[Problem]:
    """Return a problem if there is no such run, or no LoRA of it yet."""
    from ...trainer_core.runs.newest_lora import newest_lora

    problems: list[Problem] = []
    collect(problems, newest_lora, inputs.run, host.paths.output)
    return problems


def fingerprint(values: Mapping[str, Any], paths: Paths) -> str:
    """Return a text that changes when there is a newer LoRA."""
    from ...trainer_core.runs.newest_lora import newest_lora

    try:
        newest = newest_lora(str(values.get("run") or ""), paths.output)
        stat = newest.path.stat()
    except (UserError, OSError) as error:
        return str(error)
    return f"{newest.run} {newest.step} {stat.st_size} {stat.st_mtime_ns}"


def run(inputs: Inputs, host: Host) -> tuple[Any, str, int]:
    """Return the weights of the newest LoRA, its path and its step."""
    tensors, newest = _load(inputs.run, host)
    host.emit(Notice(f"LoRA of {newest.run} at step {newest.step} of {newest.total}"))
    return tensors, str(newest.path), newest.step


def _load(run: str, host: Host, tries: int = TRIES) -> tuple[LoraTensors, NewestLora]:
    from ...trainer_core.lora_tools.reader import load_tensors
    from ...trainer_core.runs.newest_lora import newest_lora

    newest = newest_lora(run, host.paths.output)
    try:
        return load_tensors(newest.path), newest
    except (UserError, OSError):
        if tries == 1 or newest.path.is_file():
            raise
        return _load(run, host, tries - 1)


SPEC = NodeSpec(
    id="LatestCheckpoint",
    title="Latest Checkpoint",
    category="ChromaTrainer/lora",
    description="Gives the newest LoRA of a run, also while the run goes on in the background: queue the graph again after "
    "a checkpoint, and it samples with that one.",
    inputs=Inputs,
    outputs=(
        LORA_MODEL,
        Output("path", "STRING", "Path of the LoRA file, in the newest checkpoint."),
        Output("step", "INT", "Step at which it was saved."),
    ),
    run=run,
    preflight=preflight,
    fingerprint=fingerprint,
    search_aliases=("lora", "checkpoint", "background", "newest", "training"),
)
