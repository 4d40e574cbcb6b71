"""Memory that runs out in a step, where the plan chose to store activations: the run goes on by itself, and its bytes stay the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.memory import MemoryConfig
from chroma_trainer.trainer_core.devices import is_out_of_memory
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import Notice
from chroma_trainer.trainer_core.models import mmdit_layers
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.train.step import loop
from chroma_trainer.trainer_core.train.step.oom_recovery import OomRecovery
from safetensors.torch import load_file

AUTO = MemoryConfig(mode="auto")


@pytest.fixture
def gelu_fails(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let calls of a function in every block raise an error of torch's or Python's, once or always, from the n-th call on."""

    def fail(error: Callable[[], Exception], first: int, times: int = 1) -> None:
        inner, calls = mmdit_layers.gelu, [0]

        def gelu(x: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                calls[0] += 1
                if first <= calls[0] < first + times:
                    raise error()
            return inner(x)

        monkeypatch.setattr(mmdit_layers, "gelu", gelu)

    return fail


def request(workshop: Any, **values: Any) -> Any:
    asked = workshop.request(steps=3, accumulation=2, caption_dropout=0.5, gradient_checkpointing=True, **values)
    return replace(asked, memory=AUTO, adapter=AdapterConfig(dropout=0.2))


def cuda() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def host_memory() -> Exception:
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"
    )


@pytest.mark.parametrize(
    "error",
    [pytest.param(cuda, marks=pytest.mark.slow), pytest.param(host_memory, marks=pytest.mark.slow), MemoryError],
)
def test_the_step_is_begun_anew_and_the_bytes_are_the_same(workshop, gelu_fails, error):
    plain = run(request(workshop), workshop.host())
    host = workshop.host()
    gelu_fails(error, first=21)  # in the second micro-batch of a step, when gradients of the first are there
    relieved = run(request(workshop), host)
    assert relieved.lora.sha256 == plain.lora.sha256
    assert relieved.losses == plain.losses
    told = [event.text for event in host.all(Notice) if "out of memory" in event.text]
    assert len(told) == 1 and "2 of 4 blocks" in told[0]


def test_when_nothing_more_can_be_given_it_is_an_error_that_names_a_remedy(workshop, gelu_fails):
    gelu_fails(cuda, first=1, times=10_000)
    host = workshop.host()
    with pytest.raises(UserError, match="out of memory in the phase 'train'"):
        run(request(workshop), host)
    assert len([1 for event in host.all(Notice) if "out of memory" in event.text]) == 2  # every second block, then all


def test_settings_made_by_hand_are_kept(workshop, gelu_fails):
    gelu_fails(cuda, first=5)
    with pytest.raises(UserError, match="out of memory in the phase 'train'"):
        run(replace(request(workshop), memory=MemoryConfig(checkpointing_interval=3)), workshop.host())


@pytest.mark.parametrize("interval", [2, pytest.param(64, marks=pytest.mark.slow)])
def test_any_interval_gives_the_same_weights(workshop, interval):
    """To the bit, so that what the plan chooses on a machine changes nothing. The file's header holds the settings."""
    every, some = (
        run(replace(request(workshop), memory=MemoryConfig(checkpointing_interval=n)), workshop.host())
        for n in (1, interval)
    )
    assert every.losses == some.losses
    first, second = load_file(every.lora.path), load_file(some.lora.path)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class Stored:
    """As long as the graph lives, so does this."""


class Breaking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, token: Stored, breaks: bool) -> torch.Tensor:
        ctx.token, ctx.breaks = token, breaks
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if ctx.breaks:
            raise cuda()
        return grads[0], None, None


def test_nothing_of_a_backward_pass_that_broke_off_is_kept(workshop, monkeypatch):
    """What it had stored is what the step begun anew wants to have room for."""
    stored: list[weakref.ref[Stored]] = []
    inner, take = loop.micro_loss, OomRecovery.take_

    def breaking(made: Any, micro: int, fetch: Any) -> torch.Tensor:
        token = Stored()
        stored.append(weakref.ref(token))
        return Breaking.apply(inner(made, micro, fetch), token, len(stored) == 4)  # type: ignore[return-value]

    def taken(relief: OomRecovery) -> None:
        assert len(stored) == 4
        assert not [ref for ref in stored if ref() is not None]
        take(relief)

    monkeypatch.setattr(loop, "micro_loss", breaking)
    monkeypatch.setattr(OomRecovery, "take_", taken)
    asked = replace(request(workshop), training=replace(request(workshop).training, accumulation=1, steps=5))
    run(asked, workshop.host())
    assert len(stored) == 6


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.60 GB, other allocations: 0.40 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_allocators_without_an_error_of_their_own_say(error, is_memory):
    assert is_out_of_memory(error) is is_memory
