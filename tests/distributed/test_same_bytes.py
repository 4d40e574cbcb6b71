"""Runs of several processes write the bytes of a run of one: LoRA, checkpoints, caches, figures and images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.config.request import TrainRequest
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.host import EvalReport, Notice, PhaseProgress, PreviewReady, StepReport
from PIL import Image

from tests.distributed.fleet import Fleet, Job
from tests.distributed.jobs import BASE, VALUES, Result, run_folder, saved
from tests.workshop import EVALUATED


def cases(workshop: Any, masks: Path) -> dict[str, TrainRequest]:
    """A covering set: each option at least once, and options that meet in a step together."""

    def request(model: dict[str, Any] | None = None, adapter: dict[str, Any] | None = None, **training: Any):
        asked = workshop.request(**{**BASE, **training})
        if model:
            asked = replace(asked, model=replace(asked.model, **model))
        return replace(asked, adapter=AdapterConfig(**(adapter or {})))

    (part,), (root,) = workshop.dataset.parts, workshop.dataset.roots
    masked = replace(part, masks=str(masks), unmasked_weight=0.2)
    prior = replace(part, prior_preservation=True)
    weighed = DatasetConfig((masked, prior), (root, root), ("", ""), (str(masks), ""))
    bf16_states = OptimizerConfig(optimizer="adamw_bf16")
    return {
        "dora, ema, dropout, held out": request(
            adapter={"kind": "dora", "ema_decay": 0.9, "dropout": 0.3}, holdout=0.25, checkpoint_every=2
        ),
        "lokr, uneven rounds": replace(request(adapter={"kind": "lokr"}, accumulation=6), optimizer=bf16_states),
        "bf16, routed": request({"dtype": "bf16"}, routed_share=0.5, route_first=1, gradient_checkpointing=True),
        "int8, rollouts": request({"quantization": QuantizationConfig("int8-quanto", "cpu")}, rollout_probability=0.5),
        "int4, eva": request({"quantization": QuantizationConfig("int4-quanto", "cpu")}, init="eva"),
        "masks, prior": replace(request(**EVALUATED), dataset=weighed),
    }


# Three processes share out 4 micro-batches unevenly. Plain LoRAs are in test_faults.py, with 2 to 4 processes.
GROUPS = [
    pytest.param(2, ("dora, ema, dropout, held out",), id="dora-2"),
    pytest.param(4, ("dora, ema, dropout, held out",), id="dora-4"),
    pytest.param(3, ("lokr, uneven rounds", "bf16, routed", "masks, prior"), id="options-3"),
    pytest.param(3, ("int8, rollouts", "int4, eva"), id="quantized-3"),
]


@pytest.fixture(scope="session")
def masks(workshop: Any) -> Path:
    folder = workshop.root / "masks"
    folder.mkdir()
    for path in Path(workshop.dataset.roots[0]).glob("*.png"):
        with Image.open(path) as picture:
            mask = Image.new("L", picture.size, 0)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(folder / path.name)
    return folder


def train(
    fleet: Fleet, folder: Path, size: int, requests: list[TrainRequest], cache: Path, **values: Any
) -> tuple[list[Path], list[Result], list[int]]:
    """Train requests on `size` ranks.

    Returns:
        The output folder of each request, the result of each rank that ended by itself, and the exit statuses.
    """
    outputs = [folder / f"output-{number}" for number in range(len(requests))]
    runs = [(request, output, cache) for request, output in zip(requests, outputs, strict=True)]
    job = Job(size, "train", {"runs": runs, **values}, folder)
    statuses = fleet.run(job)
    results = [job.result(rank) for rank, status in enumerate(statuses) if status == 0]
    if not values:
        assert statuses == [0] * size, job.log(0) + job.log(size - 1)
        assert [error for result in results for error in result.errors if error] == []
    return outputs, results, statuses


@pytest.fixture(scope="session")
def alone(fleet: Fleet, workshop: Any, masks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of one process, by the name of their case."""
    requests = cases(workshop, masks)
    results: dict[str, Any] = {}

    def run(name: str) -> Path:
        if name not in results:
            folder = tmp_path_factory.mktemp("alone")
            (results[name],), _, _ = train(fleet, folder, 1, [requests[name]], workshop.root / "cache")
        return results[name]

    return {"requests": requests, "run": run}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "names"), GROUPS)
def test_same_bytes(fleet: Fleet, workshop: Any, tmp_path: Path, alone: dict[str, Any], size: int, names: tuple):
    requests = [alone["requests"][name] for name in names]
    outputs, _, _ = train(fleet, tmp_path, size, requests, workshop.root / "cache")
    for name, output in zip(names, outputs, strict=True):
        assert saved(output) == saved(alone["run"](name)), name


@pytest.mark.slow
def test_caches_figures_images_and_events_are_the_same(fleet: Fleet, workshop: Any, tmp_path: Path):
    """From an empty cache: two processes share out captions, images, the evaluation and the validation images."""
    validation = ValidationConfig(prompts="a red cat\na blue dog\nsks", resolutions="32x32", steps=2, cfg=2.0)
    request = workshop.request(validation, **{**BASE, **EVALUATED, "validate_every": 2})
    runs = {}
    for size in (1, 2):
        folder = tmp_path / str(size)
        (output,), results, _ = train(fleet, folder, size, [request], folder / "cache")
        runs[size] = output, results
    (one, (alone,)), (two, (main, peer)) = runs[1], runs[2]
    assert saved(one) == saved(two)
    for kind in ("text", "latents"):
        assert tensors_of(tmp_path / "1" / "cache" / kind) == tensors_of(tmp_path / "2" / "cache" / kind)
    assert len(list((tmp_path / "2" / "cache" / "latents").glob("*.safetensors"))) == 2, "both ranks encoded"
    images = {path.name: path for path in (run_folder(one) / "validation").glob("*.png")}
    assert len(images) == 3
    for name, path in images.items():
        with Image.open(path) as expected, Image.open(run_folder(two) / "validation" / name) as image:
            assert expected.tobytes() == image.tobytes()
    assert [event for event in alone.events[0] if isinstance(event, EvalReport)] == [
        event for event in main.events[0] if isinstance(event, EvalReport)
    ]
    assert kinds_of(alone) == kinds_of(main)
    assert peer.events[0] == [] and not [event for event in main.events[0] if is_of_a_rank(event)]
    log = (run_folder(two) / "ranks" / "rank-1.log").read_text("utf-8")
    assert "training" in log


def tensors_of(cache: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: digest_of(t) for path in cache.glob("*.safetensors") for name, t in load_file(path).items()}


def digest_of(tensor: Any) -> bytes:
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def kinds_of(result: Result) -> list[Any]:
    """Events without times and paths. Progress within a phase is reported by rank 0 for its own share."""
    values = []
    for event in result.events[0]:
        if isinstance(event, StepReport):
            event = replace(event, seconds=0.0)
        if isinstance(event, Notice) and ("memory" in event.text or "plan" in event.text or "GB" in event.text):
            continue
        if isinstance(event, PreviewReady):
            event = replace(event, path=Path(event.path.name))
        if not isinstance(event, PhaseProgress):
            values.append(event if isinstance(event, StepReport | EvalReport | PreviewReady | Notice) else type(event))
    return values


def is_of_a_rank(event: Any) -> bool:
    return isinstance(event, Notice) and event.text.startswith("rank ")


@pytest.mark.slow  # in the everyday set a killed run of 2 continues with 4
def test_a_checkpoint_belongs_to_any_number_of_processes(fleet: Fleet, workshop: Any, tmp_path: Path, whole: Any):
    """2 steps on 2 processes, 2 on 1 and 2 on 4 are 6 steps on 1."""
    request, cache = workshop.request(**VALUES), workshop.root / "cache"
    for size, until in ((2, 2), (1, 4), (4, 6)):
        values = {"fault": "sigterm", "at": until, "on": size - 1} if until < 6 else {}
        job = Job(size, "train", {"runs": [(request, tmp_path / "parts", cache)], **values}, tmp_path / str(until))
        assert fleet.run(job) == [0] * size, job.log(0)
        assert job.result(0).steps == [until]
    assert saved(tmp_path / "parts") == whole


@pytest.mark.slow
def test_another_machine_gets_the_checkpoint(fleet: Fleet, workshop: Any, tmp_path: Path):
    """Two machines without a shared disk: the second has caches of its own, and resumes from what rank 0 sends."""
    request = workshop.request(**BASE)
    (whole,), _, _ = train(fleet, tmp_path / "whole", 1, [request], workshop.root / "cache")
    values = {"runs": [(request, tmp_path / "nodes", tmp_path / "cache")], "own_disks": True}
    first = Job(2, "train", {**values, "fault": "sigterm", "at": 2}, tmp_path / "first", nodes=2)
    assert fleet.run(first) == [0, 0], first.log(0)
    assert [error[:9] for rank in range(2) for error in first.result(rank).errors] == ["Cancelled"] * 2
    second = Job(2, "train", values, tmp_path / "second", nodes=2)
    assert fleet.run(second) == [0, 0], second.log(0) + second.log(1)
    assert saved(tmp_path / "nodes" / "machine-0") == saved(whole)
    other = run_folder(tmp_path / "nodes" / "machine-1")
    assert [path.name for path in other.iterdir()] == ["ranks"], "the second machine writes its log only"
