"""The weights for export and validation, where they differ from the trained ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ...optim.optimizer import evaluating
from ..step.state import TrainState


@contextmanager
def final_weights(state: TrainState) -> Iterator[None]:
    """Within the context, the layers hold the averaged weights, of the run's EMA or of an optimizer that averages.

    After it they hold the trained weights again, bit by bit. Where that is interrupted, the state is left marked as
    inconsistent. May be nested.
    """
    before, state.is_consistent = state.is_consistent, False
    swaps = ExitStack()
    swaps.enter_context(evaluating(state.optimizer))
    if state.ema is not None:
        swaps.enter_context(state.ema.applied(state.layers))
    try:
        yield
    finally:
        swaps.close()
        state.is_consistent = before
