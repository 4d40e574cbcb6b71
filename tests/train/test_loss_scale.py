"""fp16: gradients below its smallest number are not lost, and those above its largest end no run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import adapter_state
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.errors import Cancelled
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.hooks.checkpoint import continue_, restore_, save_checkpoint
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.train.step.loop import train_step

TRAINING = {"max_grad_norm": 0.0, "caption_dropout": 0.0}


@pytest.fixture
def state_of(workshop):
    """Returns the state of a new run whose losses are multiplied, as those of more pixels, images and batches are."""

    def make(dtype="fp16", factor=1.0, adapter=None, **values):
        request = workshop.request(model=replace(workshop.model, dtype=dtype), **{**TRAINING, **values})
        request = request if adapter is None else replace(request, adapter=adapter)
        host = workshop.host()
        state = build_run(plan_run(request, host), host, PhaseTimer())
        state.samples = [replace(sample, loss_weight=factor) for sample in state.samples]
        return state

    return make


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("factor", [2.0**-14, 2.0**14])
def test_the_gradient_is_as_long_as_the_loss_is_weighted(state_of, kind, factor):
    """A 1024 px image has 256 times as many values as one of 64 px, so each one's gradient is 256 times as small."""
    adapter = AdapterConfig(kind=kind)
    wide, plain = (train_step(state_of(dtype, adapter=adapter), 1e-4)[1] for dtype in ("fp32", "fp16"))
    loss, norm = train_step(state_of(factor=factor, adapter=adapter), 1e-4)
    assert math.isfinite(loss) and norm > 0
    assert plain == pytest.approx(wide, rel=0.02) and norm / factor == pytest.approx(plain, rel=0.01)


def test_a_step_is_repeated_where_its_gradient_is_too_large(state_of):
    """With the same batches, so that the weights are those of a scale that fits at once. It stays for later steps."""
    once, again = state_of(factor=2.0**14), state_of(factor=2.0**14)
    train_step(again, 1e-4)
    assert again.loss_scale.value < 2**16
    once.loss_scale.value = again.loss_scale.value
    train_step(once, 1e-4)
    one, two = adapter_state(once.layers), adapter_state(again.layers)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert once.loss_scale == again.loss_scale


def test_the_scale_rises_again(state_of):
    state = state_of()
    state.loss_scale.value, state.loss_scale.num_finite = 1024.0, 499
    train_step(state, 1e-4)
    assert (state.loss_scale.value, state.loss_scale.num_finite) == (4096.0, 0)


def test_a_bad_batch_is_skipped_and_leaves_the_scale(state_of):
    state = state_of(factor=math.inf, skip_bad_steps=1)
    assert math.isnan(train_step(state, 1e-4)[1]) and state.loss_scale.value == 2**16


def test_other_precisions_are_not_scaled(state_of):
    assert state_of("bf16").loss_scale is None and state_of("fp32").loss_scale is None


def test_a_run_goes_on_with_its_scale(state_of, workshop, tmp_path):
    """A resumed run, and one that continues from a LoRA with its optimizer."""
    state, resumed, continued = state_of(factor=2.0**14), state_of(), state_of()
    train_step(state, 1e-4)
    path = save_checkpoint(tmp_path / "run" / "checkpoints", state, workshop.host())
    assert state.loss_scale != resumed.loss_scale
    restore_(resumed, path)
    continue_(continued, path)
    assert state.loss_scale == resumed.loss_scale == continued.loss_scale


@pytest.mark.slow
def test_a_run_in_fp16_goes_on_to_the_same_bytes(workshop):
    request = workshop.request(model=replace(workshop.model, dtype="fp16"), steps=6, learning_rate=3e-3)
    whole = run(request, workshop.host())
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(request, host)
    assert run(request, host.cancelling_at(0)).lora.sha256 == whole.lora.sha256
