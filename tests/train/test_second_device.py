"""Whole runs on a second device, which is as strict as a GPU (tests/device/second.cpp): nothing crashes, and the numbers are the CPU's.

`CHROMA_TRAINER_SECOND_DEVICE=1 pytest tests/train/test_second_device.py`, or any other tests of runs; needs a C++ compiler and ninja.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.dataset import DatasetConfig
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.config.model import QuantizationConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.distributed.process_group import default_group, leave_own
from chroma_trainer.trainer_core.distributed.ranks import ALONE
from chroma_trainer.trainer_core.errors import Cancelled
from chroma_trainer.trainer_core.full_rank.sharding import Shard, Sharding
from chroma_trainer.trainer_core.host import Notice, StepReport
from chroma_trainer.trainer_core.memory.group_offload import swap_blocks_
from chroma_trainer.trainer_core.models import attention_check, mmdit_layers
from chroma_trainer.trainer_core.train.run import run
from safetensors.torch import load_file
from torch import nn

from tests.workshop import EVALUATED

KIND = os.environ.get("CHROMA_TRAINER_SECOND_DEVICE", "")
pytestmark = pytest.mark.skipif(
    not KIND, reason="needs a second device: CHROMA_TRAINER_SECOND_DEVICE=1 (or mps), a C++ compiler and ninja"
)
as_cuda = pytest.mark.skipif(KIND == "mps", reason="MPS has no streams and no pinned memory")
BY_HAND = MemoryConfig(model_offload=False)
PROMPTS = ValidationConfig(prompts="a cat\na dog", resolutions="32x32", steps=3, cfg=3.0, guidance="adaptive")
CLOSE = 1e-4  # relative


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    import second

    return second.library


def with_memory(request: Any, **values: Any) -> Any:
    return replace(request, memory=replace(BY_HAND, **values))


def quantised(workshop: Any, level: str, **values: Any) -> Any:
    return workshop.request(model=replace(workshop.model, quantization=QuantizationConfig(level, **values)))


CASES: dict[str, Callable[[Any], Any]] = {
    "plain": lambda w: w.request(),
    "checkpointing": lambda w: w.request(gradient_checkpointing=True, accumulation=2),
    "auto": lambda w: replace(w.request(gradient_checkpointing=True), memory=MemoryConfig(mode="auto")),
    "model_offload, parts of the text encoder": lambda w: with_memory(
        w.request(), model_offload=True, text_encoder="blocks"
    ),
    "activation_offload": lambda w: with_memory(w.request(), activation_offload=True),
    "leaf, from disk": lambda w: with_memory(
        w.request(gradient_checkpointing=True), group_offload="leaf", offload_to_disk=True
    ),
    "block, int8": lambda w: with_memory(quantised(w, "int8-quanto"), group_offload="block", activation_offload=True),
    "int8 products": lambda w: quantised(w, "int8-quanto", products="int8", text_encoder="int8-quanto"),
    "dora, dropout, average": lambda w: replace(
        w.request(), adapter=AdapterConfig(kind="dora", dropout=0.1, ema_decay=0.9)
    ),
    "eva, pictures": lambda w: w.request(PROMPTS, init="eva", validate_every=2),
    "prior": lambda w: replace(w.request(), dataset=twice(w.dataset)),
    "a whole model": lambda w: whole(w, "adafactor"),
}


def whole(workshop: Any, optimizer: str, **memory: Any) -> Any:
    """Kind full; with memory settings that say so, its weights and the optimizer's states are in RAM."""
    request = workshop.request(
        model=replace(workshop.model, dtype="bf16"), gradient_checkpointing=True, rank=16, alpha=16.0, max_grad_norm=0.0
    )
    settings = {"adapter": AdapterConfig(kind="full"), "optimizer": OptimizerConfig(optimizer=optimizer)}
    return with_memory(replace(request, **settings), **memory)


STREAMS: dict[str, Callable[[Any], Any]] = {
    "block, ahead": lambda w: with_memory(
        w.request(gradient_checkpointing=True), group_offload="block", offload_stream=True
    ),
    "half, ahead": lambda w: with_memory(
        quantised(w, "int8-quanto"), group_offload="block", offload_stream=True, offload_share=0.75
    ),
    "leaf, ahead": lambda w: with_memory(
        quantised(w, "int8-quanto"), group_offload="leaf", offload_stream=True, activation_offload=True
    ),
}


def twice(dataset: DatasetConfig) -> DatasetConfig:
    (part,) = dataset.parts
    return DatasetConfig((part, replace(part, prior_preservation=True)), dataset.roots * 2)


def losses(workshop: Any, request: Any, device: str) -> list[float]:
    host = workshop.host()
    object.__setattr__(host, "device", device)
    object.__setattr__(host, "paths", replace(host.paths, cache=workshop.root / f"cache-{device}"))
    result = run(replace(request, training=replace(request.training, steps=3, **EVALUATED)), host)
    assert not [text for text in host.told() if "no memory estimate" in text]
    return [*result.losses, result.report["eval_loss"]["after"]]


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=as_cuda) for name in STREAMS)])
def test_the_numbers_are_the_cpus(workshop, library, name):
    request = {**CASES, **STREAMS}[name](workshop)
    there = losses(workshop, request, "second")
    here = losses(workshop, replace(request, memory=replace(request.memory, offload_stream=False)), "cpu")
    assert there == pytest.approx(here, rel=CLOSE)
    gc.collect()
    assert library.second_used() == 0 and library.second_races() == 0 and library.second_strange_gradients() == 0


@pytest.mark.parametrize(
    ("optimizer", "memory"),
    [
        ("adafactor", {"group_offload": "block"}),
        pytest.param(
            "adamw", {"group_offload": "leaf", "activation_offload": True, "offload_stream": True}, marks=as_cuda
        ),
        pytest.param("adamw_bf16", {"group_offload": "block", "offload_stream": True}, marks=as_cuda),
    ],
)
def test_a_whole_model_in_ram_gives_the_bytes_of_one_on_the_device(workshop, library, optimizer, memory):
    there = run(whole(workshop, optimizer), workshop.host())
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(whole(workshop, optimizer, **memory), host)
    moved = run(whole(workshop, optimizer, **memory), host.cancelling_at(0))
    first, second = (load_file(result.lora.path) for result in (there, moved))
    assert not [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    gc.collect()
    assert library.second_used() == 0 and library.second_races() == 0


def shared_out(workshop: Any, **memory: Any) -> Any:
    """Kind full with shared-out weights, of one process; with memory settings that say so, the shares are in RAM."""
    values = {"shard": "bf16", "steps": 3, "accumulation": 2, "max_grad_norm": 0.0, "checkpoint_every": 2}
    request = workshop.request(model=replace(workshop.model, dtype="bf16"), rank=16, alpha=16.0, **values)
    settings = {"adapter": AdapterConfig(kind="full", ema_decay=0.9), "optimizer": OptimizerConfig(optimizer="adamw")}
    return with_memory(replace(request, **settings), **memory)


@pytest.fixture
def fsdp(monkeypatch):
    """FSDP2 moves parameters by set_data, which knows no device from outside."""
    from torch.distributed.fsdp._fully_shard import _fsdp_init

    def move(params: list[nn.Parameter], buffers: list[torch.Tensor], device: torch.device) -> None:
        for tensor in (*params, *buffers):
            if tensor.device != device:
                moved = tensor.detach().to(device)
                torch.utils.swap_tensors(tensor, nn.Parameter(moved) if isinstance(tensor, nn.Parameter) else moved)

    monkeypatch.setattr(_fsdp_init, "_move_states_to_device", move)


@as_cuda
def test_shares_in_ram_give_the_bytes_of_shares_on_the_device(workshop, library, fsdp):
    """The gradients of shares in RAM are copied there, and are read when the copy is done."""
    there, moved = (run(shared_out(workshop, **memory), workshop.host()) for memory in ({}, {"group_offload": "block"}))
    first, second = (load_file(result.lora.path) for result in (there, moved))
    assert not [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert all(tensor.isfinite().all() for tensor in first.values())
    gc.collect()
    assert library.second_races() == 0


@as_cuda
def test_rows_in_ram_stay_there_in_a_checkpoint(library):
    """Else the weights, states and averages of all layers would be on the device at once, and memory run out."""
    from torch.distributed.device_mesh import DeviceMesh

    try:
        sharding = Sharding(ALONE, DeviceMesh.from_group(default_group(), "second"))
        shape = torch.Size((4, 3))
        for device in ("cpu", "second"):
            rows = torch.ones(shape, device=device)
            saved = sharding.sharded(rows, Shard("x", nn.Parameter(rows), shape, 1, 0))
            assert saved.to_local().device.type == device and saved.shape == shape  # pyright: ignore
    finally:
        leave_own()


@pytest.mark.parametrize("optimizer", ["adamw_bf16", "prodigy", "schedulefree-adamw"])
def test_a_resume_ends_in_the_same_bytes(workshop, optimizer):
    request = replace(workshop.request(steps=4), optimizer=OptimizerConfig(optimizer=optimizer))
    whole, host = workshop.host(), workshop.host().cancelling_at(3)
    run(request, whole)
    with pytest.raises(Cancelled):
        run(request, host)
    later = workshop.host(host.paths.output)
    run(request, later)
    assert later.all(StepReport)[0].step > 1 and later.lora.read_bytes() == whole.lora.read_bytes()


@as_cuda
@pytest.mark.parametrize(
    "memory", [BY_HAND, replace(BY_HAND, group_offload="block", offload_stream=True, activation_offload=True)]
)
def test_a_step_waits_once(workshop, library, memory):
    waits: list[int] = []
    host = workshop.host(
        sink=lambda event: waits.append(library.second_waits()) if isinstance(event, StepReport) else None
    )
    run(replace(workshop.request(steps=6, checkpoint_every=0, gradient_checkpointing=True), memory=memory), host)
    assert waits[-1] - waits[-2] == waits[-2] - waits[-3] == 1


@as_cuda
def test_copies_ahead_take_one_group_more_however_far_the_host_is_ahead(library):
    blocks = [nn.Linear(256, 256, bias=False).requires_grad_(False) for _ in range(8)]
    group, before = 4 * 256 * 256, library.second_used()
    swap = swap_blocks_(blocks, torch.device("second"), ahead=True)
    x = torch.zeros(1, 256, device="second")
    library.second_reset_peak()
    for _ in range(3):
        for block in blocks:
            block(x)
    assert library.second_peak() - before < 2.5 * group
    assert library.second_races() == 0
    del swap, blocks, block  # pyright: ignore[reportPossiblyUnboundVariable]  # 8 blocks, 3 times
    gc.collect()
    assert library.second_used() - before < group / 2


@as_cuda
def test_memory_that_runs_out_is_freed_and_the_step_begun_anew(workshop, library):
    """The limit of the third step lies between what it takes with all activations stored and with all computed again."""
    request = workshop.request(steps=3, gradient_checkpointing=True, batch_size=4, checkpoint_every=0)
    peaks: list[int] = []

    def measured(event: Any) -> None:
        if isinstance(event, StepReport) and event.step == 2:
            library.second_reset_peak()
        if isinstance(event, StepReport) and event.step == 3:
            peaks.append(library.second_peak())

    for interval in (64, 1):
        run(with_memory(request, checkpointing_interval=interval), workshop.host(sink=measured))
    limit = (peaks[0] + peaks[1]) // 2
    assert peaks[1] < limit

    def limited(event: Any) -> None:
        if isinstance(event, StepReport):
            library.second_limit(limit if event.step == 2 else 0)

    request = replace(request, memory=MemoryConfig(mode="auto"))
    plain, host = workshop.host(), workshop.host(sink=limited)
    run(request, plain)
    try:
        run(request, host)
    finally:
        library.second_limit(0)
    assert [event.text for event in host.all(Notice) if "is retried" in event.text]
    assert host.lora.read_bytes() == plain.lora.read_bytes()


@as_cuda
def test_a_kernel_that_is_wrong_for_what_blocks_hand_it_is_left_out(workshop, library, monkeypatch, tmp_path):
    """With torch's own gradient of a concatenation, as before: the slice that cuDNN's kernel did not take."""
    for module in (attention_check, mmdit_layers):
        monkeypatch.setattr(module, "join", lambda first, second: torch.cat([first, second], dim=2))
    host, before = workshop.host(), library.second_strange_gradients()
    object.__setattr__(host, "paths", replace(host.paths, cache=tmp_path))
    result = run(workshop.request(), host)
    assert library.second_strange_gradients() > before
    assert "attention kernel native its gradients are not finite; math is used instead" in host.told()
    assert result.losses[:3] == pytest.approx(losses(workshop, workshop.request(), "cpu")[:-1], rel=CLOSE)


@as_cuda
def test_pinned_memory_is_given_back(workshop, library):
    before = library.second_host_emptied()
    run(workshop.request(steps=1), workshop.host())
    assert library.second_host_emptied() > before


def test_two_devices_in_one_operation_are_an_error():
    """Else nothing here means anything."""
    with pytest.raises(RuntimeError, match="two devices"):
        torch.add(torch.ones(3, device="second"), torch.ones(3))
    assert Path(__file__).parents[1].joinpath("device", "second.cpp").exists()
