"""A loss or a gradient that is not finite: caught before the optimiser sees it, with the files of its batch."""

from __future__ import annotations

import math

from ...devices import device_name
from ...errors import UserError
from .state import TrainState

_OTHER_DTYPE = {"fp16": ", or dtype bf16 in place of fp16", "bf16": ", or dtype fp32 in place of bf16"}


def refuse_or_skip(state: TrainState, first: int, loss: float, norm: float) -> None:
    """Returns where the step may be skipped: the optimiser has not seen its gradient, and every weight is finite.

    Args:
        first: number of the step's first micro-batch.
    Raises:
        UserError: no more steps may be skipped, or a weight is not finite.
    """
    done = sum(not math.isfinite(value) for value in state.losses)
    whole = all(bool(parameter.isfinite().all()) for parameter in state.parameters)
    if whole and done < state.config.skip_bad_steps:
        return
    state.optimizer.zero_grad(set_to_none=True)
    if not state.step_seconds:
        raise UserError.at("attention", _first_step(state, first, loss, norm))
    kept = f"The LoRA of step {state.step} is kept" if whole else "Weights are not finite; the last checkpoint is kept"
    skipped = f", after {done} skipped steps" if done else ""
    raise UserError.at(
        "learning_rate",
        f"step {state.step + 1} gave loss {loss:g} and gradient norm {norm:g}, which are not finite{skipped}; the batch was "
        f"{_files(state, first)}. {kept}. Try a lower learning rate{_OTHER_DTYPE.get(state.dtype, '')}",
    )


def _first_step(state: TrainState, first: int, loss: float, norm: float) -> str:
    """Nothing has been learnt yet: pictures and learning rates come last among the causes."""
    return (
        f"step {state.step + 1}, the first of this start, gave loss {loss:g} and gradient norm {norm:g}, which are not finite. Most likely "
        f"the model is not computed right here: attention by kernel {state.attention} in {state.dtype} on {device_name(state.device)}. "
        f"Set attention to math in MemorySettings{_OTHER_DTYPE.get(state.dtype, '')}; if that is not it, look at the batch "
        f"({_files(state, first)}) and at a LoRA that the run starts from"
    )


def describe_skipped(state: TrainState) -> str:
    """What to say of the step that has just been skipped."""
    first = (state.step - 1) * state.config.accumulation
    done = sum(not math.isfinite(value) for value in state.losses)
    return (
        f"step {state.step} was skipped: its loss or gradient is not finite; the batch was {_files(state, first)} "
        f"({done} of at most {state.config.skip_bad_steps} skipped)"
    )


def _files(state: TrainState, first: int) -> str:
    batches = range(first, first + state.config.accumulation)
    return ", ".join(str(state.samples[i].path) for micro in batches for i in state.plan.batch(micro))
