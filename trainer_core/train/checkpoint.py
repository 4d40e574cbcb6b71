"""A state to resume from: adapter, optimiser, history. A checkpoint is a folder that appears by one rename, complete, or not at all.

    step-000250/
        adapter.safetensors    trainable weights, fp32
        optimizer.safetensors  its tensors, by parameter
        state.json             step, losses, learning rates, the optimiser's plain values
        manifest.json          sha256 of each file above; written last

All randomness is derived from the seed and the step, so that there is no state of generators to keep.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..files import sha256_of, sync_folder, write_json
from ..host import CheckpointSaved, Host, Notice
from ..lora.inject import adapter_state, load_adapter_state_
from ..problems import UserError
from .loop import Run

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")


def save_checkpoint(folder: Path, run: Run, keep: int, host: Host) -> Path:
    """Write the run's state under folder and remove all but the newest `keep`. A state of this step that is there already is kept.

    Raises:
        UserError: the disk is full or can't be written to; earlier checkpoints are as they were.
    """
    target = folder / f"step-{run.step:06}"
    if target.exists() and not _fault(target):
        return target
    staging = folder / f".tmp-{target.name}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        _write(staging, run)
        shutil.rmtree(target, ignore_errors=True)  # a damaged one; os.replace wants an empty place
        os.replace(staging, target)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError.at(
            str(folder),
            f"the checkpoint of step {run.step} can't be written: {error.strerror or error}; earlier ones are intact",
        ) from error
    for old in [path for path in _by_step(folder) if path != target][: -keep + 1 or None]:
        shutil.rmtree(old, ignore_errors=True)
    host.emit(CheckpointSaved(run.step, target))
    return target


def _write(staging: Path, run: Run) -> None:
    adapter = adapter_state(run.layers)
    save_file(adapter, staging / "adapter.safetensors")
    tensors, plain = _optimizer_state(run.optimizer, list(adapter))
    save_file(tensors, staging / "optimizer.safetensors")
    state = {"step": run.step, "losses": run.losses, "learning_rates": run.learning_rates, "optimizer": plain}
    write_json(staging / "state.json", state)
    for path in staging.iterdir():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
    write_json(staging / "manifest.json", {path.name: sha256_of(path) for path in sorted(staging.iterdir())})


def _optimizer_state(
    optimizer: torch.optim.Optimizer, names: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    tensors, plain = {}, {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{names[index]}|{key}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                plain.setdefault(names[index], {})[key] = value
    return tensors, plain


def restore_(run: Run, checkpoint: Path) -> None:
    """Bring the run to the checkpoint's step. The checkpoint has been verified by `newest_intact`."""
    load_adapter_state_(run.layers, load_file(checkpoint / "adapter.safetensors"))
    state = json.loads((checkpoint / "state.json").read_text("utf-8"))
    names = list(adapter_state(run.layers))
    by_index: dict[int, dict[str, Any]] = {
        names.index(name): dict(values) for name, values in state["optimizer"].items()
    }
    for key, tensor in load_file(checkpoint / "optimizer.safetensors").items():
        name, value_name = key.rsplit("|", 1)
        by_index.setdefault(names.index(name), {})[value_name] = tensor.clone()  # the optimiser keeps it; the file must go
    run.optimizer.load_state_dict({"state": by_index, "param_groups": run.optimizer.state_dict()["param_groups"]})
    run.step, run.losses, run.learning_rates = state["step"], state["losses"], state["learning_rates"]


def newest_intact(folder: Path, host: Host, num_steps: int) -> Path | None:
    """The newest checkpoint of at most num_steps whose every file has the hash of its manifest. A damaged one is named and set aside."""
    for path in reversed(_by_step(folder)):
        if _step_of(path) > num_steps:  # the run was longer once
            continue
        fault = _fault(path)
        if not fault:
            return path
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        host.emit(
            Notice(
                f"checkpoint {path.name} is damaged ({fault}) and was set aside as {aside.name}; trying the one before",
                "warning",
            )
        )
    return None


def _fault(checkpoint: Path) -> str:
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text("utf-8"))
        for name in FILES:
            if sha256_of(checkpoint / name) != manifest[name]:
                return f"{name} has other bytes than were written"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _by_step(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdecimal()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name[5:])


def checkpoint_hook(folder: Path, every: int, keep: int, host: Host) -> Callable[[Run], None]:
    """Saves every `every` steps; 0: never."""

    def save(run: Run) -> None:
        if every and run.step % every == 0 and run.step < run.num_steps:
            save_checkpoint(folder, run, keep, host)

    return save
