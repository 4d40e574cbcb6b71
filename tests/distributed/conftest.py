"""Fixtures for runs of several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.fleet import Fleet, Job
from tests.distributed.jobs import VALUES, saved
from tests.workshop import DEVICE


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    if not hasattr(os, "fork"):
        pytest.skip("the ranks of a test are forked")
    if DEVICE != "cpu":
        pytest.skip("the ranks would not have the second device")
    with Fleet() as started:
        yield started


@pytest.fixture(scope="session")
def whole(fleet: Fleet, workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bytes of the run that nothing happened to, on one process."""
    folder = tmp_path_factory.mktemp("whole")
    job = Job(1, "train", {"runs": [(workshop.request(**VALUES), folder / "out", workshop.root / "cache")]}, folder)
    assert fleet.run(job) == [0], job.log(0)
    return saved(folder / "out")


@pytest.fixture
def start(fleet: Fleet, workshop: Any, tmp_path: Path) -> Any:
    """start(size, **fault) starts or resumes the run, and returns the job and the exit statuses."""
    count = [0]

    def run(size: int, request: Any = None, **values: Any) -> tuple[Job, list[int]]:
        count[0] += 1
        runs = [(request or workshop.request(**VALUES), tmp_path / "out", workshop.root / "cache")]
        job = Job(size, "train", {"runs": runs, **values}, tmp_path / f"job-{count[0]}")
        return job, fleet.run(job)

    return run
