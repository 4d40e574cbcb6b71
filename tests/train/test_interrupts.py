"""An exception anywhere in a step, as a signal's, running out of memory or a bug: only whole steps are ever saved."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from chroma_trainer.trainer_core.adapters.inject import adapter_state
from chroma_trainer.trainer_core.config.adapter import AdapterConfig
from chroma_trainer.trainer_core.config.optimizer import OptimizerConfig
from chroma_trainer.trainer_core.errors import Cancelled, UserError
from chroma_trainer.trainer_core.host import Notice, SinkHost
from chroma_trainer.trainer_core.train.build import build_run
from chroma_trainer.trainer_core.train.hooks.eval_loss import eval_loss
from chroma_trainer.trainer_core.train.phase_timer import PhaseTimer
from chroma_trainer.trainer_core.train.prepare import plan_run
from chroma_trainer.trainer_core.train.run import run
from chroma_trainer.trainer_core.train.step import loop
from safetensors.torch import load_file

from tests.workshop import EVALUATED

EVERY = 29  # of the calls inside a step, one of these many is interrupted; the cases begin apart


class Interrupt(BaseException):
    """Raised in the middle of whatever is being done."""


class Interrupter:
    """Raises at the n-th call of a function, of Python's or C's, while it is open. n 0 counts only."""

    def __init__(self, at: int = 0):
        self.at, self.count = at, 0

    def __enter__(self) -> Interrupter:
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _on_event(self, frame, event, argument) -> None:
        if event in ("call", "c_call"):
            self.count += 1
            if self.count == self.at:
                sys.setprofile(None)
                raise Interrupt


def build(workshop, name: str = "adamw", **values):
    host = workshop.host()
    request = replace(
        workshop.request(batch_size=1, steps=50, accumulation=2, **EVALUATED),
        optimizer=OptimizerConfig(optimizer=name), adapter=AdapterConfig(**values),
    )  # fmt: skip
    state = build_run(plan_run(request, host), host, PhaseTimer())
    state.config = replace(state.config, caption_dropout=0.0)
    return state


def snapshot(state) -> tuple:
    """Everything that a checkpoint holds, as values that can be compared."""
    moments = [
        {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in entry.items()}
        for entry in state.optimizer.state.values()
    ]
    average = {} if state.ema is None else {name: tensor.clone() for name, tensor in state.ema.ema_state().items()}
    history = (state.step, list(state.losses), list(state.learning_rates))
    return adapter_state(state.layers), moments, average, history


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def take_step(state) -> None:
    """One step of fit()."""
    until = replace(state.config)
    end, state.num_steps = state.num_steps, state.step + 1
    try:
        loop.fit(state, SinkHost(paths=None))  # type: ignore[arg-type]
    finally:
        state.num_steps, state.config = end, until


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "settings", "first"),
    [("adamw", {}, 1), ("schedulefree-adamw", {}, 11), ("adamw", {"ema_decay": 0.9}, 21)],
)
def test_what_calls_itself_consistent_is_one_whole_step(workshop, optimizer, settings, first):
    """The step is interrupted at one call after the other, with the weights put back in between."""
    state = build(workshop, optimizer, **settings)
    take_step(state)
    before = snapshot(state)
    saved = copy.deepcopy((state.optimizer.state_dict(), before))
    with Interrupter() as counter:
        take_step(state)
    after, num_calls = snapshot(state), counter.count
    assert num_calls > 200 and not equal(before, after)
    outcomes = {"before": 0, "after": 0, "marked": 0}
    for place in range(first, num_calls, EVERY):
        put_back_(state, saved)
        assert state.is_consistent and equal(snapshot(state), before)
        try:
            with Interrupter(place):
                take_step(state)
        except Interrupt:
            pass
        if not state.is_consistent:
            outcomes["marked"] += 1
            continue
        found = snapshot(state)
        assert equal(found, before) or equal(found, after), (
            f"half a step calls itself whole at call {place} of {num_calls}"
        )
        outcomes["after" if equal(found, after) else "before"] += 1
    assert outcomes["before"] > 20 and outcomes["marked"] > 0, outcomes


def put_back_(state, saved) -> None:
    torch.set_grad_enabled(True)  # torch's own contexts may have been interrupted as they closed
    settings, (adapter, _, average, (step, losses, rates)) = copy.deepcopy(saved)
    with torch.no_grad():
        for name, tensor in ((f"{n}.{part}", t) for n, layer in state.layers.items() for part, t in layer.state()):
            tensor.copy_(adapter[name])
    state.optimizer.load_state_dict(settings)
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.load_ema_state_(average)
    state.step, state.losses, state.learning_rates = step, losses, rates
    state.is_consistent = True


@pytest.mark.slow
def test_an_interrupt_while_averages_are_put_in_place_is_marked(workshop):
    state = build(workshop, ema_decay=0.5)
    take_step(state)
    take_step(state)
    whole = snapshot(state)
    with Interrupter() as counter:
        eval_loss(state, workshop.host())
    assert equal(snapshot(state), whole)
    marked = 0
    for place in range(1, counter.count, counter.count // 30):
        try:
            with Interrupter(place):
                eval_loss(state, workshop.host())
        except Interrupt:
            pass
        if state.is_consistent:
            assert equal(snapshot(state)[0], whole[0]), place
        else:
            marked += 1
            torch.set_grad_enabled(True)
            with torch.no_grad():
                for name, tensor in ((f"{n}.{p}", t) for n, layer in state.layers.items() for p, t in layer.state()):
                    tensor.copy_(whole[0][name])
            state.is_consistent = True
    assert marked < 30


@pytest.mark.parametrize(
    ("error", "step"),
    [
        (KeyboardInterrupt, 5),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((KeyboardInterrupt, 1), (MemoryError, 5), (RuntimeError, 1))
        ),
    ],
)
def test_a_step_that_breaks_off_leads_back_to_the_newest_checkpoint(workshop, plain_run, monkeypatch, error, step):
    """In the middle of the optimizer's own step: half of the weights have moved."""
    whole, host = plain_run[1], workshop.host()

    def break_off(state, *args, **kwargs):
        if state.step == step:
            state.is_consistent = False
            with torch.no_grad():
                state.parameters[0].mul_(2)
            raise error("in the midst")
        return real(state, *args, **kwargs)

    real = loop.train_step
    monkeypatch.setattr(loop, "train_step", break_off)
    with pytest.raises((error, UserError)):  # out of memory is explained
        run(workshop.request(), host)
    monkeypatch.undo()
    if step == 1:  # before the first checkpoint
        assert not (host.paths.output / "loras").exists()
        assert any("nothing to save" in event.text for event in host.all(Notice))
    else:
        assert load_file(host.lora) and host.checkpoints[-1] == "step-000004"
    result = run(workshop.request(), host)
    assert result.report["resumed_from"] == (0 if step == 1 else 4) and result.lora.sha256 == whole.lora.sha256


def test_memory_that_runs_out_between_the_weights_and_the_step_is_saved_whole(workshop, monkeypatch):
    """In the backward pass nothing has moved yet: the state of the step before is saved."""
    host = workshop.host()
    real = loop.micro_loss

    def fail(state, micro, fetch):
        if state.step == 3:
            raise MemoryError
        return real(state, micro, fetch)

    monkeypatch.setattr(loop, "micro_loss", fail)
    with pytest.raises(UserError, match="out of memory"):
        run(workshop.request(), host)
    assert host.checkpoints[-1] == "step-000003"


class BrokenPipe:
    """A console that nobody reads any more."""

    def __init__(self, after: int):
        self.after = after

    def __call__(self, event) -> None:
        self.after -= 1
        if self.after < 0:
            raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("after", [0, 5])
def test_a_sink_that_breaks_ends_no_run_and_is_logged_once(workshop, plain_run, after):
    host = workshop.host(sink=BrokenPipe(after))
    result = run(workshop.request(), host)
    assert result.lora.sha256 == plain_run[1].lora.sha256
    log = (host.run_folder / "events.jsonl").read_text("utf-8")
    assert log.count("output can't be written (brokenpipe: ") == (1 if after else log.count("output can't be written"))
    assert len(host.faults) == 1


def test_a_cancel_still_saves_the_step_it_came_after(workshop):
    host = workshop.host().cancelling_at(3)
    with pytest.raises(Cancelled):
        run(workshop.request(), host)
    assert host.checkpoints[-1] == "step-000003"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("ignored", "status"), [(False, 130), (True, 0)])
def test_a_closed_terminal_is_a_cancel_unless_it_is_ignored(ignored, status, tmp_path):
    """SIGHUP, as nohup sets it or not."""
    script = (
        "import os, signal, sys\n"
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        "from chroma_trainer.trainer_core.command_line.interrupts import Interrupts\n"
        "interrupts = Interrupts()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "sys.exit(130 if interrupts() else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert signal.SIGHUP
