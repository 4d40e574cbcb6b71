"""Fixtures for runs of several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.distributed.fleet import Fleet
from tests.workshop import DEVICE


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    if not hasattr(os, "fork"):
        pytest.skip("the ranks of a test are forked")
    if DEVICE != "cpu":
        pytest.skip("the ranks would not have the second device")
    with Fleet() as started:
        yield started
