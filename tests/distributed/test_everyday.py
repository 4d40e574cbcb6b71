"""What `make quick` runs with several processes, in one file: each worker of pytest that has such a file imports all for 5 s."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.host import CheckpointSaved
from safetensors.torch import load_file

from tests.distributed.fleet import Fleet
from tests.distributed.jobs import KILLED, saved_without, without
from tests.distributed.test_sharded import model_of, request_of
from tests.distributed.test_sharded import start as start_sharded


@pytest.mark.parametrize("on", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process(start: Any, tmp_path: Path, whole: dict[str, str], on: int):
    step = random.Random(on).randrange(1, 6)
    job, statuses = start(2, fault="kill in a step", at=step, on=on)
    assert statuses[on] == KILLED and statuses[1 - on] == 0
    (error,) = job.result(1 - on).errors
    assert error.startswith("RankLost: devices: another process of this run ended"), error
    if on == 1:  # rank 0 saves the last whole step
        saves = [event.step for event in job.result(0).events[0] if isinstance(event, CheckpointSaved)]
        assert saves[-1] == step and (tmp_path / "out" / "loras" / "tiny.safetensors").is_file()
    again, statuses = start(2)
    assert statuses == [0, 0] and again.result(0).errors == [""], again.log(0)
    assert saved_without(tmp_path, step) == without(whole, step)


def test_the_bytes_of_sharded_weights_are_those_of_whole_copies(fleet: Fleet, workshop: Any, tmp_path: Path):
    """With a micro-batch for each device both step inside of the backward pass, and add and round alike."""
    values = {"accumulation": 2, "max_grad_norm": 0.0, "steps": 3, "checkpoint_every": 0}
    copies, shares = (request_of(workshop, shard, "adamw_bf16", **values) for shard in ("off", "bf16"))
    shares = replace(
        shares, memory=MemoryConfig(group_offload="block")
    )  # CPUOffloadPolicy, here without another device
    runs = [
        (copies, tmp_path / "copies", workshop.root / "cache"),
        (shares, tmp_path / "shares", workshop.root / "cache"),
    ]
    start_sharded(fleet, tmp_path / "job", 2, runs)
    expected, weights = load_file(model_of(tmp_path / "copies")), load_file(model_of(tmp_path / "shares"))
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, weights[name])]
