"""A run that starts from the LoRA of another one goes on with its optimizer state and its batches: two runs are as one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chroma_trainer.nodes.adapter_settings import SPEC
from chroma_trainer.trainer_core.config.adapter import CONTINUED, AdapterConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import SinkHost
from chroma_trainer.trainer_core.setup.preflight import problems_of
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.workflow.lora_metadata import describe
from safetensors.torch import load_file

STEADY = {"alpha": 3.0, "steps": 2, "checkpoint_every": 0}  # alpha / rank is no power of two: B of the file is rounded


@pytest.fixture(scope="module")
def first(workshop):
    """A run of two steps: its host and its result."""
    host = workshop.host()
    return host, run(workshop.request(**STEADY), host)


def continued(workshop, first, **values):
    """The request of a run that continues the first one."""
    host, result = first
    (adapter,) = SPEC.run(SPEC.inputs(init_lora=Path(result.lora.path).name, init_optimizer=CONTINUED), listing(host))
    return replace(workshop.request(**{**STEADY, "name": "more", "steps": 4, **values}), adapter=adapter)


def listing(host):
    """A host that lists the LoRAs in the output folder, as ComfyUI does."""
    return SinkHost(paths=replace(host.paths, models={"loras": (host.paths.output / "loras",)}))


@pytest.mark.slow
def test_two_runs_are_as_one(workshop, first):
    whole = run(workshop.request(**{**STEADY, "steps": 6}), workshop.host())
    request, host = continued(workshop, first), workshop.host()
    result = run(request, host)
    assert [*first[1].losses, *result.losses] == list(whole.losses)
    one, other = load_file(whole.lora.path), load_file(result.lora.path)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert any("the optimizer continues from step-000002 of tiny-" in text for text in host.told())
    (parent,) = describe(Path(result.lora.path))["parents"]
    assert parent["sha256"] == first[1].lora.sha256 and parent["step"] == 2
    # The weights alone are another start: the optimizer is new, and so are the batches.
    alone = replace(request, adapter=replace(request.adapter, init_optimizer="new"))
    assert run(alone, workshop.host()).losses != result.losses
    # Canceled and resumed, and continued once more, it is the same.
    host = workshop.host().cancelling_at(1)
    with pytest.raises(Cancelled):
        run(request, host)
    assert run(request, host.cancelling_at(0)).lora.sha256 == result.lora.sha256
    half = workshop.host()
    second = half, run(replace(request, training=replace(request.training, steps=2)), half)
    third = run(continued(workshop, second, steps=2), workshop.host())
    assert third.losses == whole.losses[4:]


def test_what_does_not_fit_is_named(workshop, first):
    request, host = continued(workshop, first), workshop.host()
    assert problems_of(request, host) == []

    def faults(**values) -> str:
        training = replace(request.training, **values.pop("training", {}))
        return " ".join(problem.message for problem in problems_of(replace(request, training=training, **values), host))

    assert "rank is 8, and the state of tiny-" in faults(training={"rank": 8})
    assert "alpha is 4.0" in faults(training={"alpha": 0.0}) and "targets is 'mmdit'" in faults(
        training={"targets": "mmdit"}
    )
    assert "optimizer is 'lion', and" in faults(optimizer=replace(request.optimizer, optimizer="lion"))
    dora = faults(adapter=replace(request.adapter, kind="dora"))
    assert "kind is 'dora'" in dora and "of 'lora'; use that, or set init_optimizer to new" in dora
    assert faults(training={"learning_rate": 0.5, "lr_schedule": "cosine", "batch_size": 1}) == ""
    fewer = replace(request, adapter=replace(request.adapter, block_lr="transformer_blocks.0=0"))
    with pytest.raises(UserError, match="layers are not trained"):
        run(fewer, host)


def test_a_run_that_is_gone_is_named(workshop, first, tmp_path):
    host, result = first
    problems = AdapterConfig(init_optimizer=CONTINUED).problems()
    assert "init_lora names no file" in problems[0].message
    gone = workshop.host()
    file = gone.paths.output / "loras" / "tiny.safetensors"
    file.parent.mkdir(parents=True)
    shutil.copyfile(result.lora.path, file)
    with pytest.raises(
        UserError, match=r"no run in .* has saved tiny\.safetensors, so its optimizer state is not known"
    ):
        continued(workshop, (gone, result))
    shutil.copytree(host.paths.output / "chroma_trainer", gone.paths.output / "chroma_trainer")
    assert continued(workshop, (gone, result)).adapter.checkpoint.endswith("step-000002")
    shutil.rmtree(gone.run_folder / "checkpoints" / "step-000002")
    with pytest.raises(
        UserError, match=r"saved at step 2 of the run tiny-\w+, which has checkpoints of step none only"
    ):
        continued(workshop, (gone, result))
