"""Save the model of a full-rank run, as one file in output/diffusion_models, where ComfyUI lists it as a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ...adapters.inject import trainable_parameters
from ...config.request import TrainedLora
from ...full_rank.model_file import FILE_DTYPE, as_it_is, base_weights, help_to_write, write_transformer
from ...full_rank.sharding import Sharding
from ...host import Host, LoraSaved
from ...runs import layout
from ...runs.saved_loras import keep_other_lora
from ...storage.atomic import as_os_errors
from ..hooks.checkpoint import EMA_FILE, WEIGHTS_FILE
from ..hooks.eval_loss import best_step
from ..hooks.eval_weights import final_weights
from ..prepare import RunPlan
from ..step.state import TrainState
from .metadata import model_metadata


def save_model(plan: RunPlan, state: TrainState, record: Mapping[str, Any], host: Host) -> TrainedLora:
    """Save the model of the current step."""
    path = layout.model_path(host.paths.output, state.config.name)
    with final_weights(state):
        sha256 = _write(plan, state, path, model_metadata(plan, state, record), host)
    listed = layout.listed_name(path, host.paths.output)
    return TrainedLora(str(path), listed, sha256, plan.request.model, str(plan.folder), is_model=True)


def save_best_model(
    plan: RunPlan, state: TrainState, checkpoint: Path, record: Mapping[str, Any], host: Host
) -> tuple[Path, str]:
    """Save the model of a checkpoint, whose weights are read from its file one by one. Return its path and SHA-256."""
    path = layout.model_path(host.paths.output, state.config.name, best=True)
    step = str(layout.step_of(checkpoint))
    metadata = {**model_metadata(plan, state, record), "ss_steps": step}
    with _shards_of(state, checkpoint):
        return path, _write(plan, state, path, metadata, host, None if state.sharding else checkpoint)


def help_to_save(plan: RunPlan, state: TrainState, checkpoints: Path | None = None) -> None:
    """What the other ranks do while rank 0 saves the model, and then that of the best checkpoint: each has its rows.

    Args:
        checkpoints: The run's folder of checkpoints; None: the best one is not saved.
    """
    assert state.sharding is not None
    base = base_weights(plan.request.model, state.family)
    with final_weights(state):
        help_to_write(state.transformer, base, _weights_now(state), state.sharding.whole)
    step = best_step(state)
    if checkpoints is not None and step is not None:
        with _shards_of(state, checkpoints / layout.step_name(step)):
            help_to_write(state.transformer, base, _weights_now(state), state.sharding.whole)


def _shards_of(state: TrainState, checkpoint: Path) -> AbstractContextManager[None]:
    """Within the context, weights that are shared out are those of a checkpoint."""
    if state.sharding is None:
        return nullcontext()
    from ..hooks.sharded.sharded_checkpoint import weights_of_sharded  # imports torch.distributed.checkpoint

    return weights_of_sharded(state, checkpoint)


def _write(
    plan: RunPlan,
    state: TrainState,
    path: Path,
    metadata: Mapping[str, str],
    host: Host,
    checkpoint: Path | None = None,
) -> str:
    base = base_weights(plan.request.model, state.family)
    trained = _weights_in(checkpoint, state) if checkpoint else _weights_now(state)
    with keep_other_lora(path, plan.folder, host), as_os_errors(path):
        sha256, count = write_transformer(
            path, state.transformer, base, metadata, trained, plan.folder,
            state.sharding.whole if state.sharding else as_it_is,
        )  # fmt: skip
    host.emit(LoraSaved(path, sha256, count, count))
    return sha256


def _weights_now(state: TrainState) -> dict[str, Callable[[], Tensor]]:
    """Return functions that return the trained weights, which the model does not have where they are in RAM.

    Those that are shared out are gathered from all ranks, each when its turn comes.
    """
    if (sharding := state.sharding) is not None:
        return {name: partial(_whole, sharding, name) for name in sharding.shards}
    return {name: parameter.detach for name, parameter in trainable_parameters(state.layers)}


def _whole(sharding: Sharding, name: str) -> Tensor:
    shard = sharding.shards[name]
    return sharding.joined(shard.local.detach().to(FILE_DTYPE), shard.shape)


def _weights_in(checkpoint: Path, state: TrainState) -> dict[str, Callable[[], Tensor]]:
    """Return functions that read the weights of a checkpoint, averaged ones where the run averages them."""
    file = checkpoint / (EMA_FILE if state.ema is not None else WEIGHTS_FILE)

    def read(name: str) -> Tensor:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)

    return {name: lambda name=name: read(name) for name, _ in trainable_parameters(state.layers)}
