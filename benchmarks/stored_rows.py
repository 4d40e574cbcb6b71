"""Runs of settings by seeds, each stored when it is finished and not repeated: what benchmarks with rows have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Rows = dict[str, dict[str, Any]]


class Named(Protocol):
    @property
    def name(self) -> str: ...


def read_rows(result: Path) -> Rows:
    """Return the rows of a result's file, by setting, steps and seed."""
    return json.loads(result.read_text("utf-8"))["runs"] if result.is_file() else {}


def measure_missing(
    result: Path,
    settings: Iterable[Named],
    seeds: int,
    steps: int,
    measure: Callable[[Any, int], dict[str, Any]],
    figures: Callable[[Sequence[dict[str, Any]]], Mapping[str, Any]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure what the file lacks on one thread, and yield each new row once it is stored.

    Args:
        measure: Returns the row of a setting and a seed.
        figures: Returns what the file says of all rows.
    """
    import torch
    from chroma_trainer.trainer_core.storage.atomic import write_json
    from learning import machine

    torch.set_num_threads(1)
    settings = list(settings)
    for seed in range(seeds):
        for setting in settings:
            rows = read_rows(result)  # again: another process may have added its own
            key = f"{setting.name} steps={steps} seed={seed}"
            if key in rows:
                continue
            rows[key] = measure(setting, seed)
            write_json(result, {**machine(), **figures([*rows.values()]), "runs": dict(sorted(rows.items()))})
            yield key, rows[key]
