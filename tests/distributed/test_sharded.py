"""Kind full with weights that are shared out over processes (FSDP2): the same bytes for every number of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.host import CheckpointSaved, StepReport
from PIL import Image
from safetensors.torch import load_file

from tests.distributed.fleet import Fleet, Job
from tests.distributed.jobs import KILLED, digest
from tests.distributed.test_same_bytes import run_folder

SMALL = {"rank": 16, "alpha": 16.0, "batch_size": 1, "eval_images": 0, "learning_rate": 1e-3, "accumulation": 4}


def request_of(workshop: Any, shard: str, optimizer: str = "adamw", **values: Any) -> TrainRequest:
    adapter = {name: values.pop(name) for name in ("ema_decay",) if name in values}
    request = workshop.request(values.pop("validation", None), **{**SMALL, "shard": shard, **values})
    return replace(
        request, model=replace(request.model, dtype="bf16"), adapter=AdapterConfig(kind="full", **adapter),
        optimizer=OptimizerConfig(optimizer=optimizer),
    )  # fmt: skip


def start(fleet: Fleet, folder: Path, size: int, runs: list[Any], **values: Any) -> tuple[Job, list[int]]:
    job = Job(size, "train", {"runs": runs, **values}, folder)
    statuses = fleet.run(job)
    if not values:
        assert statuses == [0] * size, job.log(0) + job.log(size - 1)
        assert not any(job.result(0).errors), job.result(0).errors
    return job, statuses


def model_of(output: Path, name: str = "tiny") -> Path:
    return output / "diffusion_models" / f"{name}.safetensors"


@pytest.mark.slow
def test_any_number_resumes_with_the_same_bytes(fleet: Fleet, workshop: Any, tmp_path: Path):
    """2 processes until one finds the disk full, 1 that is stopped, 4 of which one is killed, and 2 to the end."""
    request, cache = request_of(workshop, "bf16", max_grad_norm=0.5, ema_decay=0.9), workshop.root / "cache"
    start(fleet, tmp_path / "whole", 1, [(request, tmp_path / "alone", cache)])
    runs = [(request, tmp_path / "output", cache)]
    job, _ = start(fleet, tmp_path / "full", 2, runs, fault="full disk", at=4)
    for rank in range(2):
        assert "step 4 can't be written: No space left on device; earlier" in job.result(rank).errors[0], job.log(rank)
    job, _ = start(fleet, tmp_path / "stopped", 1, runs, fault="sigterm", at=4, on=0)
    assert job.result(0).steps == [4] and job.result(0).errors[0].startswith("Cancelled")
    job, statuses = start(fleet, tmp_path / "killed", 4, runs, fault="kill in a step", at=5, on=3)
    assert statuses[3] == KILLED and "another process of this run ended" in job.result(0).errors[0]
    job, _ = start(fleet, tmp_path / "last", 2, runs)
    assert any("resumed from step 4" in str(event) for event in job.result(0).events[0])
    assert digest(model_of(tmp_path / "output")) == digest(model_of(tmp_path / "alone"))
    (last,) = (run_folder(tmp_path / "output") / "checkpoints").glob("step-000006")
    assert {path.name for path in last.iterdir()} == {
        "shard-0000.safetensors", "shard-0001.safetensors", "state.json", "manifest.json",
    }  # fmt: skip


@pytest.mark.slow
def test_checkpoints_are_written_beside_the_training(fleet: Fleet, workshop: Any, tmp_path: Path):
    """A step ends while one of two disks still writes. A process that is killed then leaves the checkpoint before."""
    values = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 1, "accumulation": 2, "max_grad_norm": 0.0}
    request, cache = request_of(workshop, "bf16", ema_decay=0.9, **values), workshop.root / "cache"
    start(fleet, tmp_path / "whole", 1, [(request, tmp_path / "alone", cache)])
    runs = [(request, tmp_path / "output", cache)]
    _, statuses = start(fleet, tmp_path / "killed", 2, runs, fault="kill in a save", at=2)
    folder = run_folder(tmp_path / "output") / "checkpoints"
    assert statuses[1] == KILLED and [path.name for path in folder.glob("step-*")] == ["step-000001"]
    job, statuses = start(fleet, tmp_path / "slow", 2, runs, fault="slow disk", at=2, on=0)
    assert statuses == [0, 0] and not any(job.result(0).errors + job.result(1).errors), job.log(1)
    assert "resumed from step 1" in str(job.result(0).events[0])
    saved = [event.step for event in job.result(0).events[0] if isinstance(event, CheckpointSaved)]
    assert saved == [2, 3, 4] and [path.name for path in folder.iterdir()] == ["step-000004"]
    assert digest(model_of(tmp_path / "output")) == digest(model_of(tmp_path / "alone"))
    for path in (run_folder(tmp_path / "alone") / "checkpoints" / "step-000004").glob("state.json"):
        assert path.read_bytes() == (folder / "step-000004" / path.name).read_bytes()


# What goes with shard: settings of the training and the adapter, of the memory, and whether the bytes are those without.
BESIDE: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "blocks recomputed": ({"gradient_checkpointing": True}, {}, True),
    "every second block recomputed": ({"gradient_checkpointing": True}, {"checkpointing_interval": 2}, True),
    "shares in RAM": ({}, {"group_offload": "block"}, True),
    "averaged weights": ({"ema_decay": 0.9}, {}, False),
}


@pytest.fixture(scope="module")
def beside(fleet: Fleet, workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Return the models of one process and of two, by the setting."""
    folder = tmp_path_factory.mktemp("beside")
    values = {"steps": 2, "accumulation": 2, "max_grad_norm": 0.0, "checkpoint_every": 0}
    requests = {
        name: replace(request_of(workshop, "bf16", **values, **training), memory=MemoryConfig(**memory))
        for name, (training, memory, _) in {"none": ({}, {}, True), **BESIDE}.items()
    }
    for size in (1, 2):
        runs = [(request, folder / f"{name}-{size}", workshop.root / "cache") for name, request in requests.items()]
        start(fleet, folder / f"job-{size}", size, runs)
    return {name: [model_of(folder / f"{name}-{size}") for size in (1, 2)] for name in requests}


@pytest.mark.slow
@pytest.mark.parametrize("name", BESIDE)
def test_what_goes_with_shared_out_weights(beside: dict[str, list[Path]], name: str):
    """Any number of processes writes the same bytes. What is refused: tests/setup/test_full_rank_check.py."""
    one, two = beside[name]
    assert digest(one) == digest(two)
    weights, plain = load_file(one), load_file(beside["none"][0])  # their headers hold the settings
    assert all(torch.equal(weights[key], plain[key]) for key in plain) == BESIDE[name][2]


@pytest.mark.slow
def test_compiled_blocks(fleet: Fleet, workshop: Any, tmp_path: Path):
    """By the compiler's front end alone: inductor takes minutes. Losses are close to those of plain blocks, not equal."""
    request = request_of(workshop, "bf16", steps=2, accumulation=2, max_grad_norm=0.0, checkpoint_every=0)
    compiled = replace(request, memory=MemoryConfig(compile=True))
    runs = [(one, tmp_path / str(number), workshop.root / "cache") for number, one in enumerate((request, compiled))]
    job, statuses = start(fleet, tmp_path / "job", 2, runs, compiler="eager")
    assert statuses == [0, 0] and not any(job.result(0).errors), job.log(0)
    assert "not compiled" not in str(job.result(0).events)
    plain, ours = ([e.loss for e in run if isinstance(e, StepReport)] for run in job.result(0).events)
    assert ours == pytest.approx(plain, rel=2e-3) and len(ours) == 2


@pytest.mark.slow
def test_evaluations_images_and_the_best_model(
    fleet: Fleet, workshop: Any, tmp_path: Path, tiny_flux_model: Any, tiny_radiance_model: Any
):
    """All weights in fp32, with steps in the backward pass of the second round. Two processes compute each image together."""
    validation = ValidationConfig(prompts="a red cat\nsks", resolutions="32x32", steps=2, cfg=2.0)
    values = {"steps": 2, "checkpoint_every": 1, "max_grad_norm": 0.0, "targets": "*"}
    watched = request_of(workshop, "fp32", validation=validation, holdout=0.25, eval_images=16, **values)
    requests = [watched] + [
        replace(request, model=replace(model, dtype="bf16"))
        for model in (tiny_flux_model, tiny_radiance_model)
        for request in [request_of(workshop, "fp32", **{**values, "checkpoint_every": 0})]
    ]
    outputs: dict[int, list[Path]] = {}
    for size in (1, 2):
        outputs[size] = [tmp_path / f"{size}-{number}" for number in range(len(requests))]
        runs = [(*pair, workshop.root / "cache") for pair in zip(requests, outputs[size], strict=True)]
        start(fleet, tmp_path / f"job-{size}", size, runs)
    for one, two in zip(*outputs.values(), strict=True):
        assert digest(model_of(one)) == digest(model_of(two))
    one, two = outputs[1][0], outputs[2][0]
    assert digest(model_of(one, "tiny-best")) == digest(model_of(two, "tiny-best"))
    images = [*(run_folder(one) / "validation").glob("*.png")]
    assert images
    for path in images:
        with Image.open(path) as expected, Image.open(run_folder(two) / "validation" / path.name) as image:
            assert expected.tobytes() == image.tobytes()


@pytest.mark.slow
def test_rows_are_read_by_any_number_of_ranks(fleet: Fleet, tmp_path: Path):
    """2 -> 1 -> 4 -> 2, to the bit; 3 rows on 4 ranks leave one without."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a|exp_avg": torch.randn(9, 5, generator=generator).bfloat16(), "b": torch.randn(3, generator=generator),
        "c": torch.randn(8, 2, 2, 3, generator=generator), "d|step": torch.tensor(7.0),
    }  # fmt: skip
    folders = [tmp_path / f"rows-{number}" for number in range(4)]
    for folder in folders:
        folder.mkdir()
    assert fleet.run(Job(2, "save_rows", {"folder": folders[0], "tensors": tensors}, tmp_path / "save")) == [0, 0]
    for number, size in enumerate((1, 4, 2)):
        values = {"folder": folders[number], "other": folders[number + 1], "tensors": tensors}
        job = Job(size, "load_rows", values, tmp_path / f"load-{size}")
        assert fleet.run(job) == [0] * size, job.log(0)
        assert all(job.result(rank) for rank in range(size))
    names = [path.name for path in sorted(folders[0].iterdir())]
    assert [digest(folders[3] / name) for name in names] == [digest(folders[0] / name) for name in names]
