"""Save and restore checkpoints: adapter, optimizer state and history.

A checkpoint is a folder that is created by one rename. It is complete, or it does not exist:

    step-000250/
        adapter.safetensors    trainable weights, in the precision of training
        optimizer.safetensors  tensors of the optimizer state, by parameter
        lora.safetensors       the same adapter as a LoRA file that loads everywhere; not with kind full
        ema.safetensors        averaged weights, where the run averages its weights
        state.json             run, step, losses, learning rates, skipped steps, losses of evaluations, other optimizer state
        manifest.json          SHA-256 of each file above; written last

All randomness is derived from the seed and the step, so there is no generator state to save.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ...adapters.files.export import export_lora
from ...adapters.files.safetensors import plan_tensors, write_tensors
from ...adapters.inject import adapter_state, live_state, load_adapter_state_, trainable_parameters
from ...distributed.ranks import ALONE, Ranks
from ...errors import UserError
from ...full_rank.sharding import SHARD_PREFIX
from ...host import CheckpointSaved, Host, Notice
from ...optim.optimizer import able
from ...runs import layout
from ...runs.layout import list_checkpoints, step_name, step_of
from ...runs.manifest import ResumeFrom
from ...storage.atomic import as_os_errors, rename, set_aside, sha256_of, sync_folder, write_json
from ..figures.leak import Leak
from ..figures.paired_evals import Evaluation
from ..step.state import TrainState
from .eval_weights import final_weights

WEIGHTS_FILE = layout.CHECKPOINT_WEIGHTS
OPTIMIZER_FILE = "optimizer.safetensors"
FILES = (WEIGHTS_FILE, OPTIMIZER_FILE, layout.CHECKPOINT_STATE)
EMA_FILE = "ema.safetensors"
STAGING = ".tmp-"  # prefix of a folder that is being written
SLACK_BYTES = 4 << 20  # for headers, JSON and the rounding of file sizes by the file system

Forms = Mapping[str, tuple[int, ...]]  # names and shapes
Load = Callable[[TrainState, Path, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint is made of.

    Attributes:
        step: Number of the step.
        files: Name of a file -> its tensors. Each part is removed when it is written.
        saved: Content of state.json.
        write_lora: Writes the LoRA at a path. None: there is none (kind full).
    """

    step: int
    files: dict[str, dict[str, Tensor]]
    saved: dict[str, Any]
    write_lora: Callable[[Path], object] | None

    @property
    def num_bytes(self) -> int:
        return sum(_size_of(tensors) for tensors in self.files.values())

    def target(self, folder: Path) -> Path:
        return folder / step_name(self.step)

    def copied(self) -> Contents:
        """Return contents with copies of the tensors in RAM, which the next step does not change."""
        files = {name: {key: t.to("cpu", copy=True) for key, t in part.items()} for name, part in self.files.items()}
        return replace(self, files=files, saved=json.loads(json.dumps(self.saved)))


def save_checkpoint(folder: Path, state: TrainState, host: Host) -> Path:
    """Save a checkpoint of the current step, unless an intact one exists.

    Args:
        folder: the run's folder of checkpoints.
    Returns:
        The checkpoint's folder.
    Raises:
        UserError: the disk is full or can't be written to, or a weight is not finite. Earlier checkpoints are
            unchanged.
    """
    if saved := find_saved(folder, state):
        return saved
    contents = contents_of(state, folder)
    target = write_checkpoint(folder, contents)
    report_saved(target, contents.step, host)
    return target


def find_saved(folder: Path, state: TrainState) -> Path | None:
    """Return the intact checkpoint of the current step; None where there is none."""
    target = folder / step_name(state.step)
    if target.exists() and not _find_fault(target):
        if _is_of(target, folder.parent.name):
            return target
        set_aside(target)  # it came here during the training
    return None


def contents_of(state: TrainState, folder: Path) -> Contents:
    """Return what a checkpoint of the current step is made of.

    Raises:
        UserError: a weight is not finite.
    """
    tensors, others = _tensors(state)
    refuse_not_finite(tensors[WEIGHTS_FILE], folder, state.step)

    def write_lora(path: Path) -> None:
        with final_weights(state):
            export_lora(state.layers, state.transformer, path, {"ss_steps": str(state.step)})

    return Contents(state.step, tensors, history(state, folder, others), None if state.is_full else write_lora)


def write_checkpoint(folder: Path, contents: Contents) -> Path:
    """Write a checkpoint. It appears by one rename.

    Raises:
        UserError: the disk is full or can't be written to. Earlier checkpoints are unchanged.
    """
    needed = contents.num_bytes
    if contents.write_lora:  # the adapter is saved once more
        needed += _size_of(contents.files[WEIGHTS_FILE])
    with staged(folder, contents.step, needed) as staging:
        digests = _write(staging, contents)
        return finish_staged(staging, contents.saved, digests)


@contextmanager
def staged(folder: Path, step: int, num_bytes: int, ranks: Ranks = ALONE) -> Iterator[Path]:
    """Yield a new folder for the files of a checkpoint, which finish_staged renames.

    Args:
        folder: the run's folder of checkpoints.
        step: number of the step.
        num_bytes: size of the files.
        ranks: who writes files there. The main one makes the folder.
    Raises:
        UserError: the disk is full or can't be written to. Earlier checkpoints are unchanged.
    """
    staging = folder / f"{STAGING}{step_name(step)}"

    def make() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        _refuse_full_disk(folder, num_bytes)

    with unwritable(staging, ranks):
        ranks.from_main(make)
        yield staging


@contextmanager
def unwritable(staging: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """Raise an OSError within the context as an error of this checkpoint, and remove what is there of it."""
    try:
        yield
    except OSError as error:
        if ranks.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise UserError.at(
            str(staging.parent),
            f"the checkpoint of step {step_of(target_of(staging))} can't be written: {error.strerror or error}; "
            "earlier checkpoints are intact",
        ) from error


def finish_staged(staging: Path, saved: Mapping[str, Any], digests: Mapping[str, str]) -> Path:
    """Write state.json and the manifest beside the files of a staged checkpoint, and rename it. Return its folder.

    Args:
        saved: content of state.json.
        digests: SHA-256 of files that are known, by name.
    """
    target = target_of(staging)
    write_json(staging / layout.CHECKPOINT_STATE, saved)
    for path in staging.iterdir():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
    files = {path.name: digests.get(path.name) or sha256_of(path) for path in sorted(staging.iterdir())}
    write_json(staging / layout.CHECKPOINT_MANIFEST, files)
    sync_folder(staging)
    shutil.rmtree(target, ignore_errors=True)  # a damaged checkpoint; os.replace needs a free name
    rename(staging, target)
    sync_folder(staging.parent)
    return target


def target_of(staging: Path) -> Path:
    """Return the folder that a staged checkpoint becomes."""
    return staging.with_name(staging.name.removeprefix(STAGING))


def report_saved(target: Path, step: int, host: Host) -> None:
    host.emit(CheckpointSaved(step, target))


def prune(folder: Path, newest: Path, keep: int, keep_every: int = 0, best: int | None = None) -> None:
    """Delete all but the last `keep` checkpoints.

    Args:
        folder: the run's folder of checkpoints.
        newest: the checkpoint just saved. It stays and counts as the last one, also where the folder has later steps.
        keep: how many checkpoints stay.
        keep_every: checkpoints of steps divisible by it stay as well; 0: none.
        best: the checkpoint of this step stays as well.
    """
    others = [path for path in list_checkpoints(folder) if path != newest]
    for old in others[: -keep + 1 or None]:
        step = step_of(old)
        if step != best and not (keep_every and step % keep_every == 0):
            shutil.rmtree(old, ignore_errors=True)


def _tensors(state: TrainState) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
    """Return the tensors of each file, and the optimizer state that is not in tensors.

    They are copies on the CPU, but with kind full the run's own tensors, which may fill the RAM of a machine twice.
    """
    optimizer, others = optimizer_state(state)
    adapter = live_state(state.layers) if state.is_full else adapter_state(state.layers)
    files = {WEIGHTS_FILE: adapter, OPTIMIZER_FILE: optimizer}
    if state.ema is not None:
        files[EMA_FILE] = state.ema.ema_state()
    return files, others


def refuse_not_finite(adapter: Mapping[str, Tensor], folder: Path, step: int) -> None:
    bad = [name for name, tensor in adapter.items() if not tensor.isfinite().all()]
    if bad:
        raise UserError.at(
            str(folder),
            f"{len(bad)} of {len(adapter)} weights are not finite after step {step}, such as {bad[0]}; this state is "
            "not saved, and the last good checkpoint is intact. Try a lower learning rate",
        )


def _refuse_full_disk(folder: Path, num_bytes: int) -> None:
    needed = SLACK_BYTES + num_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"it needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; free disk space and run again to resume"
        )


def _size_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _write(staging: Path, contents: Contents) -> dict[str, str]:
    """Write the files of tensors, and return hashes that are known. Each part is freed as soon as it is written."""
    digests: dict[str, str] = {}
    for name in [*contents.files]:
        with as_os_errors(staging / name):
            if contents.write_lora is None:
                digests[name] = write_tensors(staging / name, plan_tensors(contents.files.pop(name)), {})
            else:
                save_file(contents.files.pop(name), staging / name)
    if contents.write_lora:
        contents.write_lora(staging / layout.CHECKPOINT_LORA)
    return digests


def history(state: TrainState, folder: Path, others: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of state.json: the run's history, and the optimizer's state that is not in tensors."""
    saved = {
        "run": folder.parent.name,
        "step": state.step,
        "losses": [loss if math.isfinite(loss) else None for loss in state.losses],  # None: the step was skipped
        "learning_rates": state.learning_rates,
        "eval_losses": {str(step): value for step, value in state.eval_losses.items()},
        "evaluations": {str(step): value.as_json() for step, value in state.evaluations.items()},
        "leaks": {str(step): value.as_json() for step, value in state.leaks.items()},
        "optimizer": others,
        "optimizer_kind": able(state.optimizer).stored_name,
        "accumulation": state.config.accumulation,
    }
    if state.steps_before:
        saved["steps_before"] = state.steps_before
    if state.loss_scale:
        saved["loss_scale"] = state.loss_scale.as_json()
    if state.is_full:
        saved["grad_norm"] = None if math.isnan(state.grad_norm) else state.grad_norm
    return saved


def optimizer_state(state: TrainState) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return the optimizer state: tensors by `parameter|name`, and all other values by parameter."""
    tensors, others = {}, {}
    names = parameter_names(state)
    for index, values in state.optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach()
                tensors[f"{names[index]}|{key}"] = value if state.is_full else value.to("cpu", copy=True).contiguous()
            else:
                others.setdefault(names[index], {})[key] = value
    return tensors, others


def parameter_names(state: TrainState) -> list[str]:
    """Return the names of the parameters in the optimizer's order."""
    names = {id(parameter): name for name, parameter in trainable_parameters(state.layers)}
    return [names[id(parameter)] for group in state.optimizer.param_groups for parameter in group["params"]]


def restore_(state: TrainState, checkpoint: Path, load: Load | None = None) -> None:
    """Restore the run's state from a checkpoint that `newest_intact` has verified.

    Args:
        load: loads the tensors, given content of state.json. None: load_weights_.
    Raises:
        UserError: the checkpoint is of another adapter or optimizer.
    """
    saved = _read_state(checkpoint)
    (load or load_weights_)(state, checkpoint, saved)
    state.step, state.learning_rates = saved["step"], saved["learning_rates"]
    state.steps_before = saved.get("steps_before", 0)
    _restore_scale_(state, saved)
    state.grad_norm = math.nan if saved.get("grad_norm") is None else saved["grad_norm"]
    state.losses = [math.nan if loss is None else loss for loss in saved["losses"]]
    state.eval_losses = {int(step): tuple(value) for step, value in saved["eval_losses"].items()}
    start = {step: evaluation for step, evaluation in state.evaluations.items() if step == 0}  # of this process
    past = saved.get("evaluations", {})  # older checkpoints have none
    state.evaluations = {int(step): Evaluation.from_json(value) for step, value in past.items()} | start
    state.leaks = {int(step): Leak.from_json(value) for step, value in saved.get("leaks", {}).items()}


def continue_(state: TrainState, checkpoint: Path) -> None:
    """Start a new run with the weights, the averages and the optimizer state of another run's checkpoint.

    Its batches are counted on from that run's last one, so that with equal settings both are as one long run.

    Raises:
        UserError: the checkpoint is damaged, or of another adapter or optimizer.
    """
    if fault := _find_fault(checkpoint):
        raise UserError.at("init_optimizer", f"{checkpoint} is damaged ({fault}); set init_optimizer to new")
    saved = _read_state(checkpoint)
    load_weights_(state, checkpoint, saved)
    _restore_scale_(state, saved)
    accumulation = saved.get("accumulation", state.config.accumulation)
    batches = (saved.get("steps_before", 0) + saved["step"]) * accumulation
    state.steps_before = -(-batches // state.config.accumulation)


def _restore_scale_(state: TrainState, saved: Mapping[str, Any]) -> None:
    if state.loss_scale and "loss_scale" in saved:  # older checkpoints have none
        state.loss_scale.load_(saved["loss_scale"])


@contextmanager
def weights_of(state: TrainState, checkpoint: Path) -> Iterator[None]:
    """Within the context, the run's parameters are those of the checkpoint, as for export. Restore them after it."""
    adapter, optimizer = adapter_state(state.layers), copy.deepcopy(state.optimizer.state_dict())
    ema = state.ema.ema_state() if state.ema is not None else None
    try:
        load_weights_(state, checkpoint, _read_state(checkpoint))
        with final_weights(state):
            yield
    finally:
        load_adapter_state_(state.layers, adapter)
        if state.ema is not None:
            state.ema.load_ema_state_(ema)
        state.optimizer.load_state_dict(optimizer)


def load_weights_(state: TrainState, checkpoint: Path, saved: Mapping[str, Any]) -> None:
    """Load the adapter with the optimizer state and the averaged weights that belong to it."""
    if not (checkpoint / WEIGHTS_FILE).is_file():
        raise UserError.at(
            "on_change",
            f"can't resume from {checkpoint}: its weights are shared out (shard), and those of this run are not; set shard "
            "as it was, or set on_change to anew",
        )
    adapter = load_file(checkpoint / WEIGHTS_FILE)
    refuse_other_form(_forms(live_state(state.layers)), _forms(adapter), checkpoint)
    refuse_other_optimizer(state, saved, checkpoint)
    load_adapter_state_(state.layers, adapter)
    if state.ema is not None and (checkpoint / EMA_FILE).is_file():
        state.ema.load_ema_state_(load_file(checkpoint / EMA_FILE))
    elif state.ema is not None:  # resumed from a run without averaged weights
        state.ema.begin_(state.layers)
    devices = {name: parameter.device for name, parameter in trainable_parameters(state.layers)}

    def own(key: str, tensor: Tensor) -> Tensor:
        # A copy, because the optimizer holds the tensor and the mapped file must be closed. On a device it makes its own,
        # and the states of a whole model would fill the RAM.
        is_copied = state.is_full and devices[key.rsplit("|", 1)[0]].type != "cpu"
        return tensor if is_copied else tensor.clone()

    tensors = load_file(checkpoint / OPTIMIZER_FILE)
    load_optimizer_(state, ((key, own(key, tensor)) for key, tensor in tensors.items()), saved["optimizer"])


def load_optimizer_(
    state: TrainState, tensors: Iterable[tuple[str, Tensor]], others: Mapping[str, Mapping[str, Any]]
) -> None:
    """Load the state that optimizer_state has returned, which it holds from now on."""
    names = parameter_names(state)
    by_index: dict[int, dict[str, Any]] = {names.index(name): dict(values) for name, values in others.items()}
    for key, tensor in tensors:
        name, value_name = key.rsplit("|", 1)
        by_index.setdefault(names.index(name), {})[value_name] = tensor
    state.optimizer.load_state_dict({"state": by_index, "param_groups": state.optimizer.state_dict()["param_groups"]})


def refuse_other_optimizer(state: TrainState, saved: Mapping[str, Any], checkpoint: Path) -> None:
    expected = able(state.optimizer).stored_name
    stored = saved.get("optimizer_kind", expected)
    if expected != stored:
        raise UserError.at(
            "on_change",
            f"can't resume from {checkpoint}: its optimizer state is of {stored}, and this run uses {expected}; "
            "choose that optimizer again, or set on_change to anew",
        )


def _forms(tensors: Mapping[str, Tensor]) -> Forms:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def refuse_other_form(expected: Forms, stored: Forms, checkpoint: Path) -> None:
    """Raise UserError unless a checkpoint has the weights of this run, by their names and shapes."""
    if expected != stored:
        other = sorted(name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name))
        raise UserError.at(
            "on_change",
            f"can't resume from {checkpoint}: {len(other)} of its {len(stored)} weights have another shape or name, "
            f"such as {other[0]} ({stored.get(other[0])}, expected {expected.get(other[0])}); set on_change to anew",
        )


def newest_intact(folder: Path, host: Host, num_steps: int) -> Path | None:
    """Return the newest checkpoint whose files all match the hashes of its manifest; None where there is none.

    A damaged checkpoint is reported and renamed.

    Args:
        folder: the run's folder of checkpoints.
        num_steps: checkpoints of later steps are ignored.
    Raises:
        UserError: it is a checkpoint of another run.
    """
    for path in reversed(list_checkpoints(folder)):
        if step_of(path) > num_steps:  # from when the run had more steps
            continue
        fault = _find_fault(path)
        if not fault:
            _refuse_other_run(path, folder.parent.name)
            return path
        renamed = set_aside(path)
        host.emit(
            Notice(
                f"checkpoint {path.name} is damaged ({fault}) and was renamed to {renamed.name}; trying the one before",
                "warning",
            )
        )
    return None


def newest_sound(run_folder: Path) -> Path | None:
    """Return the newest intact checkpoint of a run, without renaming damaged ones; None where there is none."""
    checkpoints = reversed(list_checkpoints(run_folder / layout.CHECKPOINTS))
    return next((path for path in checkpoints if not _find_fault(path) and _is_of(path, run_folder.name)), None)


def _is_of(checkpoint: Path, run: str) -> bool:
    """Return whether an intact checkpoint is of this run. Older checkpoints do not name theirs."""
    return _run_of(checkpoint) in ("", run)


def _run_of(checkpoint: Path) -> str:
    return str(_read_state(checkpoint).get("run", ""))


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint that is intact."""
    return json.loads((checkpoint / layout.CHECKPOINT_STATE).read_text("utf-8"))


def _refuse_other_run(checkpoint: Path, run: str) -> None:
    if not _is_of(checkpoint, run):
        raise UserError.at(
            str(checkpoint),
            f"is a checkpoint of the run {_run_of(checkpoint)}, and this is the run {run}; move it to the checkpoints "
            "folder of its run, or delete it. To continue from another run, set on_change to adopt",
        )


def _find_fault(checkpoint: Path) -> str:
    """Return '' for an intact checkpoint, else what is wrong with it."""
    try:
        manifest = json.loads((checkpoint / layout.CHECKPOINT_MANIFEST).read_text("utf-8"))
        is_sharded = any(name.startswith(SHARD_PREFIX) for name in manifest)
        missing = {layout.CHECKPOINT_STATE} - manifest.keys() if is_sharded else set(FILES) - manifest.keys()
        if missing:
            return f"its manifest lacks {', '.join(sorted(missing))}"
        for name in manifest:
            if sha256_of(checkpoint / name) != manifest[name]:
                return f"the SHA-256 of {name} does not match its manifest"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def adopt(resume_from: ResumeFrom, folder: Path, host: Host) -> None:
    """Copy the newest intact checkpoint of the unfinished run into the new run's folder."""
    newest = newest_intact(resume_from.folder / layout.CHECKPOINTS, host, sys.maxsize)
    if newest is None:
        return
    target = folder / layout.CHECKPOINTS / newest.name
    staging = target.with_name(f".tmp-{newest.name}")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(newest, staging)
    _rename_run(staging, folder.name)
    rename(staging, target)
    sync_folder(target.parent)
    host.emit(Notice(f"{resume_from.changes}; the run resumes from its {newest.name}, as on_change says", "warning"))


def _rename_run(checkpoint: Path, run: str) -> None:
    """Let a copied checkpoint name its new run."""
    state, manifest = checkpoint / layout.CHECKPOINT_STATE, checkpoint / layout.CHECKPOINT_MANIFEST
    write_json(state, _read_state(checkpoint) | {"run": run})
    write_json(manifest, json.loads(manifest.read_text("utf-8")) | {state.name: sha256_of(state)})
