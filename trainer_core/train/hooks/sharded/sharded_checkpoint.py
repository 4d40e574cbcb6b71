"""Checkpoints of a model whose weights are shared out over the ranks: as in checkpoint.py, but for the files of tensors.

    step-000250/
        shard-0000.safetensors  rank 0's rows of weights, optimizer states and averages; of each rank one (shard_files.py)
        state.json, manifest.json

All ranks write into the staging folder of rank 0, which renames it. Any number of ranks resumes from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ....adapters.ema import COUNT
from ....adapters.inject import adapter_state, load_adapter_state_
from ....distributed.ranks import Ranks
from ....errors import UserError, one_line
from ....full_rank.shard_files import ShardReader, ShardWriter, shard_file, shard_files
from ....full_rank.sharding import Shard, Sharding
from ....host import Host
from ...step.state import TrainState
from ..checkpoint import (
    find_saved,
    finish_staged,
    history,
    load_optimizer_,
    optimizer_state,
    refuse_not_finite,
    refuse_other_form,
    refuse_other_optimizer,
    report_saved,
    staged,
)

WEIGHT, OPTIMIZER, AVERAGE = "weight", "optimizer", "average"  # first part of a tensor's name, before a |


def save_sharded(folder: Path, state: TrainState, host: Host) -> Path:
    """Save a checkpoint of the current step, unless an intact one exists. All ranks call it together.

    Args:
        folder: The run's folder of checkpoints.
    Raises:
        UserError: As save_checkpoint.
    """
    if saved := find_saved_together(folder, state):
        return saved
    contents = shares_of(state, folder)
    with staged(folder, state.step, contents.num_bytes, state.ranks) as staging:
        writer = contents.give(ShardWriter(staging, state.ranks.rank))
        target = finish_together(staging, contents.saved, writer, state.ranks)
    if state.ranks.is_main:
        report_saved(target, state.step, host)
    return target


@dataclass(frozen=True)
class Shares:
    """What a checkpoint is made of.

    Attributes:
        tensors: This rank's rows of sharded tensors, and others as they are, by name.
        saved: Content of state.json.
        own_bytes: Size of this rank's tensors.
        num_bytes: Size of those of all ranks.
    """

    tensors: Mapping[str, Tensor]
    saved: Mapping[str, Any]
    own_bytes: int
    num_bytes: int

    def give(self, writer: ShardWriter) -> ShardWriter:
        """Let a writer write the tensors, or copy them. All ranks call it together.

        Raises:
            OSError: The disk of any rank is full or can't be written to.
        """
        with _errors_of_the_disk():
            save(dict(self.tensors), storage_writer=writer)
        return writer


def find_saved_together(folder: Path, state: TrainState) -> Path | None:
    """Return the intact checkpoint of the current step; None where there is none. All ranks call it together."""
    saved = state.ranks.from_main(lambda: str(find_saved(folder, state) or ""))
    return Path(saved) if saved else None


def shares_of(state: TrainState, folder: Path) -> Shares:
    """Return what a checkpoint of the current step is made of. All ranks call it together.

    Raises:
        UserError: A weight of any rank is not finite.
    """
    assert state.sharding is not None
    weights = {shard.name: shard.local.detach() for shard in state.sharding.shards.values()}
    state.ranks.together(lambda: refuse_not_finite(weights, folder, state.step))
    tensors, others = _tensors(state, state.sharding)
    own_bytes = _local_bytes(tensors)
    num_bytes = sum(state.ranks.together(lambda: own_bytes))
    return Shares(tensors, history(state, folder, others), own_bytes, num_bytes)


def finish_together(staging: Path, saved: Mapping[str, Any], writer: ShardWriter, ranks: Ranks) -> Path:
    """Let rank 0 complete a checkpoint whose files all ranks have written, and rename it. Return its folder."""
    digests = ranks.together(lambda: writer.sha256)
    hashes = {shard_file(rank): digest for rank, digest in enumerate(digests)}
    return Path(ranks.from_main(lambda: str(finish_staged(staging, saved, hashes))))


def _tensors(state: TrainState, sharding: Sharding) -> tuple[dict[str, Tensor], Mapping[str, Mapping[str, Any]]]:
    """Return what DCP saves, by name, and the optimizer's values that are no tensors."""
    shards = sharding.shards
    states, others = optimizer_state(state)
    tensors = {f"{WEIGHT}|{shard.name}": sharding.sharded(shard.local.detach(), shard) for shard in shards.values()}
    for key, value in states.items():
        shard = shards[key.rsplit("|", 1)[0]]
        tensors[f"{OPTIMIZER}|{key}"] = sharding.sharded(value, shard) if _is_shared(value, shard) else value
    if state.ema is not None:
        for name, value in state.ema.ema_state().items():
            tensors[f"{AVERAGE}|{name}"] = value if name == COUNT else sharding.sharded(value, shards[name])
    return tensors, others


def _is_shared(value: Tensor, shard: Shard) -> bool:
    """Return whether a state has an element for each of the weight's. Others, such as a count, are equal on all ranks."""
    return value.ndim > 0 and value.shape == shard.local.shape


def _local_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in map(_rows, tensors.values()))


def _rows(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor; another one as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def load_sharded_(state: TrainState, checkpoint: Path, saved: Mapping[str, Any]) -> None:
    """Load weights, optimizer state and averages, which any number of ranks has saved. All ranks call it together.

    Raises:
        UserError: The checkpoint is of another model or optimizer, or of whole weights.
    """
    assert state.sharding is not None
    shards = state.sharding.shards
    reader = _reader(state, checkpoint)
    refuse_other_optimizer(state, saved, checkpoint)
    targets = _targets(state.sharding, reader)
    load(targets, storage_reader=reader)
    load_adapter_state_(state.layers, {name: targets[f"{WEIGHT}|{name}"].to_local() for name in shards})
    if state.ema is not None and f"{AVERAGE}|{COUNT}" in targets:
        values = {name: targets[f"{AVERAGE}|{name}"] for name in (*shards, COUNT)}
        state.ema.load_ema_state_({name: _rows(value) for name, value in values.items()})
    elif state.ema is not None:  # resumed from a run without averaged weights
        state.ema.begin_(state.layers)
    prefix = f"{OPTIMIZER}|"
    states = ((key.removeprefix(prefix), _rows(value)) for key, value in targets.items() if key.startswith(prefix))
    load_optimizer_(state, states, saved["optimizer"])


@contextmanager
def weights_of_sharded(state: TrainState, checkpoint: Path) -> Iterator[None]:
    """Within the context, the run's parameters are those of the checkpoint, as for export. All ranks enter it together."""
    assert state.sharding is not None
    trained = adapter_state(state.layers)
    reader = _reader(state, checkpoint)
    group = WEIGHT if state.ema is None else AVERAGE
    targets = {
        key: value
        for key, value in _targets(state.sharding, reader).items()
        if key.startswith(f"{group}|") and key != f"{AVERAGE}|{COUNT}"
    }
    load(targets, storage_reader=reader)
    before, state.is_consistent = state.is_consistent, False
    try:
        load_adapter_state_(state.layers, {key.partition("|")[2]: value.to_local() for key, value in targets.items()})
        yield
    finally:
        load_adapter_state_(state.layers, trained)
        state.is_consistent = before


def _reader(state: TrainState, checkpoint: Path) -> ShardReader:
    if not shard_files(checkpoint):
        raise UserError.at(
            "on_change",
            f"can't resume from {checkpoint}: it holds whole weights, and this run shares them out (shard); set shard as it "
            "was, or set on_change to anew",
        )
    reader = ShardReader(checkpoint)
    reader.read_metadata()
    stored = {
        name.partition("|")[2]: tuple(size) for name, (size, _) in reader.forms.items() if name.startswith(WEIGHT)
    }
    assert state.sharding is not None
    refuse_other_form({shard.name: tuple(shard.shape) for shard in state.sharding.shards.values()}, stored, checkpoint)
    return reader


def _targets(sharding: Sharding, reader: ShardReader) -> dict[str, Any]:
    """Return a tensor to load into for each that the files hold, with the rows of this rank."""
    targets: dict[str, Any] = {}
    for key, (size, dtype) in reader.forms.items():
        group, _, rest = key.partition("|")
        shard = sharding.shards.get(rest.rsplit("|", 1)[0] if group == OPTIMIZER else rest)
        if shard is not None and size == shard.shape and size:
            device = "cpu" if group == AVERAGE else shard.local.device
            targets[key] = sharding.sharded(torch.empty(shard.local.shape, dtype=dtype, device=device), shard)
        else:
            targets[key] = torch.empty(size, dtype=dtype)
    return targets


@contextmanager
def _errors_of_the_disk() -> Iterator[None]:
    """Raise an OSError that DCP reports, of any rank, as such."""
    try:
        yield
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        cause = next((failure for failure in failures if isinstance(failure, OSError)), None)
        if cause is None:
            raise RuntimeError(f"torch.distributed.checkpoint: {one_line(error)}") from error
        raise OSError(cause.errno, cause.strerror or str(cause)) from error
