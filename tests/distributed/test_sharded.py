"""Kind full with weights that are shared out over processes (FSDP2): the same bytes for every number of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.host import StepReport

from tests.distributed.fleet import Fleet, Job
from tests.distributed.jobs import digest

SMALL = {"rank": 16, "alpha": 16.0, "batch_size": 1, "eval_images": 0, "learning_rate": 1e-3, "steps": 6}


def request_of(workshop: Any, optimizer: str, shard: str, **values: Any) -> Any:
    request = workshop.request(**{**SMALL, "accumulation": 4, "shard": shard, **values})
    return replace(
        request, model=replace(request.model, dtype="bf16"), adapter=AdapterConfig(kind="full"),
        optimizer=OptimizerConfig(optimizer=optimizer),
    )  # fmt: skip


def train(fleet: Fleet, folder: Path, size: int, request: Any, output: Path, cache: Path, **values: Any) -> Job:
    job = Job(size, "train", {"runs": [(request, output, cache)], **values}, folder)
    statuses = fleet.run(job)
    if values.get("fault", "sigterm") == "sigterm":
        assert statuses == [0] * size, job.log(0) + job.log(size - 1)
    return job


def model_of(output: Path) -> str:
    (path,) = (output / "diffusion_models").iterdir()
    return digest(path)


def test_one(fleet, workshop, tmp_path):
    request = request_of(workshop, "adamw", "bf16", max_grad_norm=0.5)
    for size in (1, 2, 4):
        job = train(fleet, tmp_path / f"j{size}", size, request, tmp_path / f"o{size}", workshop.root / "cache")
        print(job.result(0).errors, model_of(tmp_path / f"o{size}"), [e.loss for e in job.result(0).events[0] if isinstance(e, StepReport)])
    assert 0
