"""Catch a loss or gradient that is not finite before the optimizer sees it, and name the files of its batch."""

from __future__ import annotations

import math
from typing import NoReturn

from ...devices import device_name
from ...errors import UserError
from .state import TrainState

_OTHER_DTYPE = {"fp16": ", or dtype bf16 instead of fp16", "bf16": ", or dtype fp32 instead of bf16"}


def refuse_or_skip(state: TrainState, first: int, loss: float, norm: float) -> None:
    """Return if the step may be skipped: the optimizer has not seen its gradient, and every weight is finite.

    Args:
        first: number of the step's first micro-batch.
    Raises:
        UserError: no more steps may be skipped, or a weight is not finite.
    """
    num_skipped = sum(not math.isfinite(value) for value in state.losses)
    is_finite = all(bool(parameter.isfinite().all()) for parameter in state.parameters)
    if is_finite and num_skipped < state.config.skip_bad_steps:
        return
    state.optimizer.zero_grad(set_to_none=True)
    if not state.step_seconds:
        raise UserError.at("attention", _describe_first_step(state, first, loss, norm))
    saved = (
        f"The {'model' if state.is_full else 'LoRA'} of step {state.step} is saved"
        if is_finite
        else "Weights are not finite; the last checkpoint is intact"
    )
    skipped = f", after {num_skipped} skipped steps" if num_skipped else ""
    raise UserError.at(
        "learning_rate",
        f"step {state.step + 1} gave loss {loss:g} and gradient norm {norm:g}, which are not finite{skipped}; "
        f"the batch was {_files(state, first)}. {saved}. Try a lower learning rate{_OTHER_DTYPE.get(state.dtype, '')}",
    )


def refuse_half_step(state: TrainState, first: int, loss: float, norm: float) -> NoReturn:
    """Raise for a gradient that was not finite, and has moved weights before that was known (kind full).

    Raises:
        UserError: always. The state is marked as inconsistent, so the last checkpoint takes its place.
    """
    raise UserError.at(
        "learning_rate",
        f"step {state.step + 1} gave loss {loss:g} and gradient norm {norm:g}, which is not finite; the batch was "
        f"{_files(state, first)}. Kind full moves the weights inside of the backward pass, so these are of no use any "
        f"more; the last checkpoint is intact. Try a lower learning rate{_OTHER_DTYPE.get(state.dtype, '')}",
    )


def _describe_first_step(state: TrainState, first: int, loss: float, norm: float) -> str:
    """Return the message for a failure in the first step.

    Nothing is trained yet, so images and learning rates come last among the causes.
    """
    return (
        f"step {state.step + 1}, the first since the start, gave loss {loss:g} and gradient norm {norm:g}, which are "
        f"not finite. Most likely the model is not computed correctly here: attention kernel {state.attention} in "
        f"{state.dtype} on {device_name(state.device)}. "
        f"Set attention to math in MemorySettings{_OTHER_DTYPE.get(state.dtype, '')}; if that does not help, look at "
        f"the batch ({_files(state, first)}) and at the LoRA that the run starts from, if there is one"
    )


def describe_skipped(state: TrainState) -> str:
    """Return the message for the step that has just been skipped."""
    first = state.first_micro - state.config.accumulation
    num_skipped = sum(not math.isfinite(value) for value in state.losses)
    return (
        f"step {state.step} was skipped: its loss or gradient is not finite; the batch was {_files(state, first)} "
        f"({num_skipped} of at most {state.config.skip_bad_steps} skipped)"
    )


def _files(state: TrainState, first: int) -> str:
    batches = range(first, first + state.config.accumulation)
    return ", ".join(str(state.samples[i].path) for micro in batches for i in state.plan.batch(micro))
