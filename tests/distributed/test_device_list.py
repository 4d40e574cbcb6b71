"""What `--devices` means, on machines with and without accelerators."""

from __future__ import annotations

import subprocess
import sys

import pytest
from chroma_trainer.trainer_core.distributed import device_list
from chroma_trainer.trainer_core.distributed.device_list import device_of_rank, devices_of, only_device
from chroma_trainer.trainer_core.distributed.ranks import ALONE, Ranks
from chroma_trainer.trainer_core.errors import UserError

FOUR = ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_list, "accelerators", lambda: FOUR)


@pytest.mark.parametrize(
    ("text", "accumulation", "expected"),
    [
        ("", 4, []), ("1", 4, [""]), ("2", 4, FOUR[:2]), ("0", 4, FOUR[:1]),
        ("0,2", 4, ["cuda:0", "cuda:2"]), ("auto", 8, FOUR), ("auto", 3, FOUR[:3]),
        ("auto", 1, []), ("cuda:1, cuda:3", 4, ["cuda:1", "cuda:3"]), ("CPU:2", 4, ["cpu", "cpu"]), ("cpu", 4, ["cpu"]),
        ("cpu:1", 4, ["cpu"]), ("cuda:1", 4, ["cuda:1"]),
    ],
)  # fmt: skip
def test_what_a_setting_selects(four: None, text: str, accumulation: int, expected: list[str]):
    assert devices_of(text, accumulation) == expected


@pytest.mark.parametrize(
    ("accumulation", "machines", "expected"), [(4, 1, 4), (6, 1, 3), (5, 1, 0), (8, 2, 4), (6, 2, 3), (1, 1, 0)]
)
def test_auto_selects_devices_that_share_out_the_micro_batches_evenly(four: None, accumulation, machines, expected):
    """Devices that share out the weights compute together (shard). 0: this process alone."""
    assert devices_of("auto", accumulation, machines, is_even=True) == FOUR[:expected]
    assert devices_of("3", accumulation, machines, is_even=True) == FOUR[:3]  # an explicit number is not changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "5 devices are wanted; this machine has cuda:0, cuda:1, cuda:2, cuda:3. Use at most that many, or cpu:5"),
        ("0,4", "cuda:4: not available"), ("gpu", "'gpu' is not a list of devices; use auto, a number"),
        ("0,0", "names a device twice"), ("cpu:0", "cpu:0: not available"),
    ],
)  # fmt: skip
def test_what_is_refused(four: None, text: str, message: str):
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(".", r"\.")):
        devices_of(text, 4)


def test_a_machine_without_accelerators(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device_list, "accelerators", lambda: [])
    assert devices_of("auto", 8) == [] and devices_of("cpu:3", 8) == ["cpu"] * 3
    with pytest.raises(UserError, match="this machine has no CUDA, ROCm or XPU device"):
        devices_of("2", 8)


def test_one_device_by_name():
    assert [only_device(text) for text in ("", "auto", "0,1", "cuda:1", "cpu:2", "cpu", "mps")] == [
        "", "", "", "cuda:1", "cpu", "cpu", "mps",
    ]  # fmt: skip


def test_more_processes_than_devices(four: None, monkeypatch: pytest.MonkeyPatch):
    values = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="8 processes were started on this machine, which has 4 devices"):
        device_of_rank()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [4, 5])
def test_every_micro_batch_has_one_rank(size: int, accumulation: int):
    own = []
    for rank in range(size):
        ranks, micros = Ranks(rank, size), [rank]
        while (following := ranks.next_micro(micros[-1], accumulation)) < 3 * accumulation:
            micros.append(following)
        assert micros == [step * accumulation + n for step in range(3) for n in ranks.numbers(accumulation)]
        own += micros
    assert sorted(own) == list(range(3 * accumulation))


def test_one_process_shares_with_nobody():
    def check() -> None:
        raise KeyboardInterrupt

    assert ALONE.share_out(3, lambda number: number**2) == [0, 1, 4] and list(ALONE.deal("abc")) == ["a", "b", "c"]
    with pytest.raises(KeyboardInterrupt):
        ALONE.agree(check)


def test_one_process_talks_to_no_group():
    """A run of one process does not join a process group, and ranks.py needs no torch."""
    code = (
        "import sys; from chroma_trainer.trainer_core.distributed import ranks, device_list; "
        "assert ranks.ALONE.size == 1; device_list.devices_of('cpu:2', 2); assert 'torch' not in sys.modules; "
        "from chroma_trainer.trainer_core.distributed.process_group import join; import torch.distributed as dist; "
        "assert join() is ranks.ALONE and not dist.is_initialized()"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
