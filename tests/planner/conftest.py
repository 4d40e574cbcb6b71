"""Tests of the plan count for themselves."""

from __future__ import annotations

from typing import Any

import pytest
from chroma_trainer.trainer_core.planner.cost_cache import CostCache


@pytest.fixture(autouse=True)
def own_counts(shared_counts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CostCache, "get_or_count", shared_counts)
