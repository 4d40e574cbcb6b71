"""Kind full on several processes: the gradient of each layer is the sum of all micro-batches, in order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.host import StepReport
from chroma_trainer.trainer_core.setup import full_rank_check
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.train.step import loop
from safetensors.torch import load_file

from tests.distributed.fleet import Fleet, Job
from tests.distributed.jobs import KILLED


def request_of(workshop: Any) -> Any:
    request = workshop.request(
        rank=16, alpha=16.0, max_grad_norm=0.0, accumulation=2, batch_size=1, steps=6, eval_images=0, learning_rate=1e-3
    )
    model = replace(request.model, dtype="bf16")
    config = OptimizerConfig(optimizer="adafactor")
    return replace(request, model=model, adapter=AdapterConfig(kind="full"), optimizer=config)


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    (path,) = (output / "diffusion_models").iterdir()
    return load_file(path)


def one_after_the_other(state, stepper, compute_loss, fetch):
    """The step in one process: all gradients of each micro-batch, added in order, then a step of each weight."""
    parameters, total, losses = state.parameters, {}, 0.0
    for micro in range(state.step * 2, state.step * 2 + 2):
        loss = compute_loss(state, micro, fetch) / 2
        loss.backward()
        losses += float(loss.detach())
        for parameter in parameters:
            gradient = parameter.grad.float()
            total[parameter] = total[parameter] + gradient if parameter in total else gradient
            parameter.grad = None
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
        stepper.ranks = SimpleNamespace(sum_in_order=lambda _, own=total[parameter]: own)
        stepper.step_(parameter, state.step)
    return losses, 0.0


@pytest.fixture(scope="module")
def alone(workshop: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A run of one process, and the weights that it saved."""
    host = workshop.host()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "full_rank_step", one_after_the_other)
        patch.setattr(full_rank_check, "device_problems", lambda *_: [])
        result = run(request_of(workshop), host)
    return result, weights_of(host.paths.output)


FAULTS = (("kill in a save", 0, 2), ("kill in a step", 1, 3), ("sigterm", 0, 5))


@pytest.mark.slow
@pytest.mark.parametrize("faults", [(), FAULTS], ids=["whole", "killed"])
def test_the_bytes_are_those_of_one_process_whatever_is_killed(
    fleet: Fleet, workshop: Any, tmp_path: Path, alone: Any, faults: Any
):
    runs = [(request_of(workshop), tmp_path / "output", workshop.root / "cache")]
    for fault, on, step in faults:
        job = Job(2, "train", {"runs": runs, "fault": fault, "at": step, "on": on}, tmp_path / fault)
        statuses = fleet.run(job)
        assert statuses[on] == (0 if fault == "sigterm" else KILLED), job.log(0) + job.log(1)
    job = Job(2, "train", {"runs": runs}, tmp_path / "last")
    assert fleet.run(job) == [0, 0], job.log(0) + job.log(1)
    losses = [event.loss for event in job.result(0).events[0] if isinstance(event, StepReport)]
    result, expected = alone
    assert losses and losses == list(result.losses[-len(losses) :])
    weights = weights_of(tmp_path / "output")
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, weights[name])]
