"""What happens to one process of a run happens to all: they end together, and a resume gives the same bytes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.host import Notice

from tests.distributed.fleet import Fleet, Job
from tests.distributed.jobs import KILLED, VALUES, run_folder, saved, saved_without, without
from tests.distributed.test_same_bytes import tensors_of


def texts(job: Job, rank: int = 0) -> list[str]:
    return [event.text for event in job.result(rank).events[0] if isinstance(event, Notice)]


@pytest.mark.slow
def test_rank_0_killed_within_a_save(start: Any, tmp_path: Path, whole: dict[str, str]):
    job, statuses = start(2, fault="kill in a save", at=4, on=0)
    assert statuses == [KILLED, 0] and job.result(1).errors[0].startswith("RankLost"), job.log(1)
    checkpoints = run_folder(tmp_path / "out") / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-000002"]
    _, statuses = start(4)
    assert statuses == [0] * 4 and saved(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stop", "pause"])
def test_a_command_ends_all_at_the_same_step(start: Any, tmp_path: Path, whole: dict[str, str], fault: str):
    job, statuses = start(2, fault=fault, at=3, on=0)
    assert statuses == [0, 0] and job.result(0).steps == [3]
    kind = {"stop": "Stopped", "pause": "Paused"}[fault]
    assert job.result(0).errors[0].startswith(kind) and job.result(1).errors[0].startswith("Cancelled")
    _, statuses = start(2)
    assert statuses == [0, 0] and saved_without(tmp_path, 3) == without(whole, 3)


@pytest.mark.slow
def test_a_signal_to_another_rank_ends_all_at_the_same_step(start: Any, tmp_path: Path):
    job, statuses = start(3, fault="sigterm", at=3, on=2)
    assert statuses == [0, 0, 0] and job.result(0).steps == [3]
    assert [job.result(rank).errors[0][:9] for rank in range(3)] == ["Cancelled"] * 3
    assert (run_folder(tmp_path / "out") / "checkpoints" / "step-000003").is_dir()


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_rank(start: Any, tmp_path: Path):
    """All refuse the step alike, and its files are those of all ranks' batches."""
    job, statuses = start(2, fault="not finite", at=3, on=1)
    assert statuses == [0, 0]
    one, other = job.result(0).errors[0], job.result(1).errors[0]
    assert one == other and "step 4 gave loss nan" in one and one.count(".png") == 4
    assert (run_folder(tmp_path / "out") / "checkpoints" / "step-000003").is_dir()


@pytest.mark.slow
def test_a_skipped_step_is_skipped_by_all(start: Any, workshop: Any):
    request = workshop.request(**VALUES, skip_bad_steps=1)
    job, statuses = start(2, request, fault="not finite", at=3, on=1)
    assert statuses == [0, 0] and [job.result(rank).errors for rank in (0, 1)] == [[""], [""]], job.log(1)
    assert any("step 4 was skipped" in text for text in texts(job))
    assert not any(text.startswith("rank 1") for text in texts(job)), "rank 0 says the same"


@pytest.mark.slow
def test_an_error_of_another_rank_is_said_by_rank_0(start: Any, tmp_path: Path, whole: dict[str, str]):
    job, statuses = start(2, fault="error", at=3, on=1)
    assert statuses == [0, 0]
    assert "rank 1 (cpu on " in job.result(0).errors[0] and "the device fell off the bus" in job.result(0).errors[0]
    _, statuses = start(1)
    assert statuses == [0] and saved_without(tmp_path, 3) == without(whole, 3)


@pytest.mark.slow
def test_a_bit_that_flips_on_one_rank(start: Any, tmp_path: Path, whole: dict[str, str]):
    job, statuses = start(3, fault="a bit flips", at=3, on=2)
    assert statuses == [0, 0, 0]
    error = job.result(0).errors[0]
    assert "after step 4 the weights of rank 2 (cpu on " in error and "differ from those of rank 0" in error
    assert "The last checkpoint, step-000002, is intact" in error, error
    checkpoints = run_folder(tmp_path / "out") / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"], "the state is not saved"
    _, statuses = start(2)
    assert statuses == [0, 0] and saved(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_bit_is_noticed_without_a_checkpoint(start: Any, workshop: Any, tmp_path: Path):
    request = workshop.request(**{**VALUES, "steps": 80, "checkpoint_every": 0})
    job, statuses = start(2, request, fault="a bit flips", at=20, on=1)
    assert statuses == [0, 0]
    assert "after step 50 the weights of rank 1" in job.result(0).errors[0]
    assert not (tmp_path / "out" / "loras").exists() and not (run_folder(tmp_path / "out") / "checkpoints").exists()


@pytest.mark.slow
def test_out_of_memory_on_one_rank_repeats_its_micro_batch(start: Any, workshop: Any, tmp_path: Path):
    def request() -> Any:
        asked = workshop.request(**{**VALUES, "gradient_checkpointing": True})
        return replace(asked, memory=MemoryConfig(mode="auto"), adapter=AdapterConfig(dropout=0.2))

    _, statuses = start(1, request())
    assert statuses == [0]
    whole = saved(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    job, statuses = start(2, request(), fault="out of memory", at=3, on=1)
    assert statuses == [0, 0] and job.result(0).errors == [""], job.log(1)
    assert any(text.startswith("rank 1 (cpu on ") and "out of memory" in text for text in texts(job)), texts(job)
    assert saved(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_slow_rank_is_waited_for(fleet: Fleet, workshop: Any, tmp_path: Path):
    request, caches = workshop.request(**VALUES), {}
    for size, values in ((1, {}), (2, {"fault": "slow", "on": 1})):
        folder = tmp_path / str(size)
        job = Job(size, "train", {"runs": [(request, folder / "out", folder / "cache")], **values}, folder)
        assert fleet.run(job) == [0] * size, job.log(0)
        caches[size] = tensors_of(folder / "cache" / "latents")
    assert caches[1] == caches[2] and saved(tmp_path / "1" / "out") == saved(tmp_path / "2" / "out")


@pytest.mark.slow
def test_an_image_that_cannot_be_read_is_left_out_by_all(fleet: Fleet, workshop: Any, tmp_path: Path):
    (root,) = workshop.dataset.roots
    folder = tmp_path / "pictures"
    shutil.copytree(root, folder)
    data = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(data[:60] + bytes(40) + data[100:])  # the header is whole
    (part,) = workshop.dataset.parts
    dataset = replace(workshop.dataset, parts=(replace(part, folder=str(folder)),), roots=(str(folder),))
    request = replace(workshop.request(**VALUES), dataset=dataset)
    for size in (1, 2):
        where = tmp_path / str(size)
        job = Job(size, "train", {"runs": [(request, where / "out", where / "cache")]}, where)
        assert fleet.run(job) == [0] * size and job.result(0).errors == [""], job.result(0).errors
    assert saved(tmp_path / "1" / "out") == saved(tmp_path / "2" / "out")


@pytest.mark.slow
def test_another_dataset_on_a_rank_is_refused_by_name(fleet: Fleet, workshop: Any, tmp_path: Path):
    job = Job(2, "train_other_dataset", {"request": workshop.request(**VALUES), "folder": tmp_path}, tmp_path, nodes=2)
    assert fleet.run(job) == [0, 0], job.log(0)
    for rank in (0, 1):
        error = job.result(rank).errors[0]
        assert (
            error.startswith("UserError: dataset: rank 1 (cpu on ") and "all processes of a run need the same" in error
        )
    assert not (tmp_path / "out" / "loras").exists()


@pytest.mark.slow
def test_another_version_on_a_rank_is_refused_by_name(fleet: Fleet, workshop: Any, tmp_path: Path):
    values = {"request": workshop.request(**VALUES), "folder": tmp_path, "version": "0.0.1"}
    job = Job(2, "train_other_dataset", values, tmp_path, nodes=2)
    assert fleet.run(job) == [0, 0], job.log(0)
    error = job.result(0).errors[0]
    assert error.startswith("UserError: chroma-trainer: rank 1 (cpu on ") and "has '0.0.1', and rank 0" in error
