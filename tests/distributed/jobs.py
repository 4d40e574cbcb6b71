"""What the ranks of a test do. Each function runs in a process of its own, see fleet.py."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.data.cache import latents
from chroma_trainer.trainer_core.distributed.process_group import join
from chroma_trainer.trainer_core.host import Event, StepReport
from chroma_trainer.trainer_core.models.attention_backends import compile_blocks_
from chroma_trainer.trainer_core.runs.control import request as send_command
from chroma_trainer.trainer_core.setup import placement
from chroma_trainer.trainer_core.train.hooks import checkpoint
from chroma_trainer.trainer_core.train.results import metadata
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.train.step import loop
from torch import nn

from tests.workshop import Recorder

KILLED = -9  # SIGKILL
BASE = {"accumulation": 4, "batch_size": 1, "steps": 4, "caption_dropout": 0.3}
VALUES = {**BASE, "steps": 6, "checkpoint_every": 2, "keep_checkpoints": 9}  # of the fixture `whole`


def exchange(rank: int, gradients: list[list[torch.Tensor]]) -> dict[str, Any]:
    """Add up given gradients, [micro-batch][parameter]; and the same with torch's own all_reduce."""
    import torch.distributed as dist

    ranks = join()
    parameters = [nn.Parameter(torch.zeros_like(tensor)) for tensor in gradients[0]]

    def backward(micro: int) -> torch.Tensor:
        for parameter, gradient in zip(parameters, gradients[micro], strict=True):
            parameter.grad = gradient.clone()
        return gradients[micro][0].flatten()[0].float()

    loss = ranks.add_gradients_(parameters, range(len(gradients)), backward)
    reduced = [torch.zeros_like(tensor) for tensor in gradients[0]]
    for micro in ranks.numbers(len(gradients)):
        for total, gradient in zip(reduced, gradients[micro], strict=True):
            total += gradient
    for total in reduced:
        dist.all_reduce(total)
    return {"loss": loss, "sums": [parameter.grad for parameter in parameters], "reduced": reduced}


def exchange_without_last(rank: int, gradients: list[list[torch.Tensor]]) -> list[torch.Tensor | None]:
    """Add up gradients where the last parameter never has one."""
    parameters = [nn.Parameter(torch.zeros_like(tensor)) for tensor in gradients[0]]

    def backward(micro: int) -> torch.Tensor:
        for parameter, gradient in zip(parameters[:-1], gradients[micro][:-1], strict=True):
            parameter.grad = gradient.clone()
        return torch.zeros(())

    join().add_gradients_(parameters, range(len(gradients)), backward)
    return [parameter.grad for parameter in parameters]


def save_rows(rank: int, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Save tensors with torch.distributed.checkpoint, each rank its rows; those without dimensions as they are."""
    from chroma_trainer.trainer_core.full_rank.shard_files import ShardWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    save(_rows_of(tensors), storage_writer=ShardWriter(folder, rank))


def load_rows(rank: int, folder: Path, other: Path, tensors: dict[str, torch.Tensor]) -> bool:
    """Load what another number of ranks has saved, save it in another folder, and return whether all rows are equal."""
    from chroma_trainer.trainer_core.full_rank.shard_files import ShardReader, ShardWriter
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    expected = _rows_of(tensors)
    loaded = _rows_of({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    load(loaded, storage_reader=ShardReader(folder))
    save(loaded, storage_writer=ShardWriter(other, rank))
    local = [[getattr(tensor, "_local_tensor", tensor) for tensor in part.values()] for part in (loaded, expected)]
    return all(torch.equal(*pair) for pair in zip(*local, strict=True))


def _rows_of(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    from chroma_trainer.trainer_core.distributed.process_group import default_group
    from chroma_trainer.trainer_core.full_rank.sharding import Shard, Sharding, rows_each
    from torch.distributed.device_mesh import DeviceMesh

    ranks = join()
    sharding = Sharding(ranks, DeviceMesh.from_group(default_group(), "cpu"))
    rows = {}
    for name, tensor in tensors.items():
        if tensor.ndim:
            count = rows_each(tensor.shape, ranks.size)
            own = tensor[count * ranks.rank : count * (ranks.rank + 1)].clone()
            shard = Shard(name, nn.Parameter(own, requires_grad=False), tensor.shape, ranks.size, 0)
            rows[name] = sharding.sharded(own, shard)
        else:
            rows[name] = tensor
    return rows


@dataclass
class Result:
    """What a rank's runs did."""

    errors: list[str] = field(default_factory=list)
    events: list[list[Event]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


def train(
    rank: int,
    runs: list[tuple[TrainRequest, Path, Path]],
    fault: str = "",
    at: int = 0,
    on: int = 1,
    own_disks: bool = False,
    compiler: str = "",
) -> Result:
    """Run requests one after another.

    Args:
        runs: request, output and cache of each.
        fault: what happens on rank `on`, see FAULTS.
        at: at which step.
        on: which rank.
        own_disks: each rank has folders of its own, as on machines without a shared disk.
        compiler: backend of torch.compile; inductor takes minutes.
    """
    result = Result()
    if compiler:
        placement.compile_blocks_ = partial(compile_blocks_, backend=compiler)
    for number, (request, output, cache) in enumerate(runs):
        if own_disks:
            output, cache = output / f"machine-{rank}", cache / f"machine-{rank}"
        host = Recorder(output, cache)
        if fault and rank == on and number == 0:
            FAULTS[fault](host, at)
        try:
            run(request, host)
            result.errors.append("")
        except BaseException as error:
            result.errors.append(f"{type(error).__name__}: {error}")
        result.events.append(host.all(object))
        result.steps.append(max((event.step for event in host.all(StepReport)), default=0))
    return result


def train_other_dataset(rank: int, request: TrainRequest, folder: Path, version: str = "") -> Result:
    """Run a request whose images are others on rank 1; or, with a version, whose rank 1 has another version."""
    if rank == 1 and version:
        metadata.VERSION = version
    elif rank == 1:
        own = folder / "other" / Path(request.dataset.roots[0]).name
        shutil.copytree(request.dataset.roots[0], own)
        (own / "0.txt").write_text("another caption", "utf-8")
        (part,) = request.dataset.parts
        dataset = replace(request.dataset, parts=(replace(part, folder=str(own)),), roots=(str(own),))
        request = replace(request, dataset=dataset)
    return train(rank, [(request, folder / "out", folder / "cache")])


def at_step(host: Recorder, step: int, act: Callable[[], None]) -> None:
    def see(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == step:
            act()

    object.__setattr__(host, "sinks", (*host.sinks, see))


def kill_within_a_step(host: Recorder, step: int) -> None:
    """SIGKILL after the forward pass of the second micro-batch of a step that this rank computes."""
    real, calls = loop.micro_loss, [0]

    def dying(state: Any, micro: int, *others: Any) -> torch.Tensor:
        calls[0] += 1
        if state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(state, micro, *others)

    loop.micro_loss = dying


def kill_within_a_save(host: Recorder, step: int) -> None:
    """SIGKILL when the checkpoint's first file of this step is written."""

    def dying(real: Any) -> Any:
        def write(*arguments: Any) -> Any:
            result = real(*arguments)
            if any(isinstance(part, Path) and f"step-{step:06}" in str(part) for part in arguments):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return write

    from chroma_trainer.trainer_core.full_rank import shard_files

    checkpoint.save_file, checkpoint.write_tensors = dying(checkpoint.save_file), dying(checkpoint.write_tensors)
    shard_files.write_tensors = dying(shard_files.write_tensors)


def slow_disk(host: Recorder, step: int) -> None:
    """The checkpoint of this step is written once the step after it has ended; the job fails if it waits for the disk."""
    from chroma_trainer.trainer_core.full_rank import shard_files

    real, goes_on = shard_files.write_tensors, threading.Event()

    def waiting(path: Path, *others: Any) -> str:
        if f"step-{step:06}" in str(path):
            assert goes_on.wait(100), "the training waits for the disk"
            (step_before_last,) = path.parent.parent.glob("step-*")
            assert step_before_last.name == f"step-{step - 1:06}"
        return real(path, *others)

    shard_files.write_tensors = waiting
    at_step(host, step + 1, goes_on.set)


def full_disk(host: Recorder, step: int) -> None:
    """The disk is full when this rank writes its rows at this step."""
    from chroma_trainer.trainer_core.full_rank import shard_files

    real = shard_files.write_tensors

    def failing(path: Path, *others: Any) -> str:
        if f"step-{step:06}" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *others)

    shard_files.write_tensors = failing


def not_finite(host: Recorder, step: int) -> None:
    real = loop.micro_loss

    def spoilt(state: Any, micro: int, *others: Any) -> torch.Tensor:
        return real(state, micro, *others) * (float("nan") if state.step == step else 1.0)

    loop.micro_loss = spoilt


def out_of_memory_once(host: Recorder, step: int) -> None:
    real, calls = loop.micro_loss, [0]

    def failing(state: Any, micro: int, *others: Any) -> torch.Tensor:
        loss = real(state, micro, *others)
        calls[0] += 1
        if calls[0] == step + 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    loop.micro_loss = failing


def flip_a_bit(host: Recorder, step: int) -> None:
    real = loop.train_step

    def flipped(state: Any, *others: Any) -> Any:
        result = real(state, *others)
        if state.step == step:
            state.parameters[0].data.view(torch.int32).view(-1)[0] ^= 1
        return result

    loop.train_step = flipped


def slow_to_encode(host: Recorder, step: int) -> None:
    real = latents._pixels

    def slow(*values: Any) -> Any:
        time.sleep(1)
        return real(*values)

    latents._pixels = slow


def sigterm(host: Recorder, step: int) -> None:
    """What the command line does with SIGTERM: the host says that the run is cancelled."""
    real, seen = loop.train_step, [False]

    def watched(state: Any, *others: Any) -> Any:
        seen[0] = seen[0] or state.step + 1 == step
        return real(state, *others)

    loop.train_step = watched
    object.__setattr__(host, "is_cancelled", lambda: seen[0])


def command(name: str) -> Callable[[Recorder, int], None]:
    return lambda host, step: at_step(host, step, lambda: void(send_command(host.run_folder, name)))


def void(value: object) -> None:
    pass


def error_of_its_own(host: Recorder, step: int) -> None:
    real = loop.micro_loss

    def failing(state: Any, micro: int, *others: Any) -> torch.Tensor:
        if state.step == step:
            raise RuntimeError("the device fell off the bus")
        return real(state, micro, *others)

    loop.micro_loss = failing


FAULTS: dict[str, Callable[[Recorder, int], None]] = {
    "kill in a step": kill_within_a_step,
    "kill in a save": kill_within_a_save,
    "full disk": full_disk,
    "slow disk": slow_disk,
    "not finite": not_finite,
    "out of memory": out_of_memory_once,
    "a bit flips": flip_a_bit,
    "slow": slow_to_encode,
    "sigterm": sigterm,
    "stop": command("stop"),
    "pause": command("pause"),
    "error": error_of_its_own,
}


def bytes_of(run_folder: Path, lora: Path) -> dict[str, str]:
    """SHA-256 of the LoRA and of every file of every checkpoint."""
    paths = [lora, *sorted(path for path in (run_folder / "checkpoints").rglob("*") if path.is_file())]
    return {path.name if path == lora else path.relative_to(run_folder).as_posix(): digest(path) for path in paths}


def run_folder(output: Path) -> Path:
    (path,) = (output / "chroma_trainer").iterdir()
    return path


def saved(output: Path) -> dict[str, str]:
    return bytes_of(run_folder(output), output / "loras" / "tiny.safetensors")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def saved_without(tmp_path: Path, step: int) -> dict[str, str]:
    return without(saved(tmp_path / "out"), step)


def without(values: dict[str, str], step: int) -> dict[str, str]:
    """Leave out the checkpoint of a step that only an interrupted run has."""
    return {name: value for name, value in values.items() if step % 2 == 0 or f"step-{step:06}" not in name}
