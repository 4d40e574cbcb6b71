"""The newest LoRA of a run, also while the run goes on: that of its newest checkpoint. Needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..storage.lora_name import ENDING
from .control import UNREADABLE, find_run_by_name, read_status, runs_in
from .layout import CHECKPOINT_LORA, CHECKPOINTS, list_checkpoints, step_of


@dataclass(frozen=True)
class NewestLora:
    """A LoRA of a run.

    Args:
        run: name of the run's folder.
        path: the file.
        step: step at which it was saved.
        total: steps of the run.
    """

    run: str
    path: Path
    step: int
    total: int


def newest_lora(text: str, output: Path) -> NewestLora:
    """Return the newest LoRA of a run.

    Args:
        text: name of the LoRA or of the run's folder; "" for the run that was active last.
        output: the output folder.
    Raises:
        UserError: there is no such run, or it has no checkpoint.
    """
    name = text.strip().replace("\\", "/")
    folder = _find(name[: -len(ENDING)] if name.lower().endswith(ENDING) else name, output)
    status = read_status(folder)
    for checkpoint in reversed(list_checkpoints(folder / CHECKPOINTS)):
        path = checkpoint / CHECKPOINT_LORA
        if os.path.isfile(path):
            return NewestLora(folder.name, path, step_of(checkpoint), status.total if status else 0)
    about = status.text() if status else UNREADABLE
    text = f"{folder.name} has no checkpoint yet: {about}. LoRATrainer.checkpoint_every says when there will be one"
    raise UserError.at("run", text)


def _find(name: str, output: Path) -> Path:
    """Return the folder of a run in the output folder."""
    if name:
        return find_run_by_name(name, output)
    folders = runs_in(output)
    if not folders:
        raise UserError.at("run", "there is no run yet; start one with LoRATrainer, with background on")
    return folders[0]
