"""Fixtures for runs of several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.distributed.fleet import Fleet


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    if not hasattr(os, "fork"):
        pytest.skip("the ranks of a test are forked")
    with Fleet() as started:
        yield started
